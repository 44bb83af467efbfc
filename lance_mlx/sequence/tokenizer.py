"""Qwen2.5-VL's byte-level BPE tokenizer, built from the files of an official checkpoint."""

from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lance_mlx.config import LanceConfig
from lance_mlx.errors import LanceError, reason
from lance_mlx.files import read_json
from lance_mlx.requests.prompt_data import PROMPT_DATA

TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")


class LanceTokenizer:
    """Text to token ids, as upstream's Qwen2Tokenizer with `add_special_tokens=False`.

    Control tokens written out in the text become their ids. Text is normalised to NFC.
    """

    def __init__(self, folder: Path) -> None:
        """Read vocab.json, merges.txt and tokenizer_config.json; raises LanceError naming an unusable file."""
        vocab, merges, config = (folder / name for name in TOKENIZER_FILES)
        for path in (vocab, merges, config):
            if not path.is_file():
                raise LanceError(f"{path} is missing: the tokenizer files belong beside model.safetensors")
        try:
            bpe = models.BPE.from_file(str(vocab), str(merges))
            # Every token beyond the bytes comes of a merge: without it, text would quietly become other tokens.
            lines = merges.read_text("utf-8").split("\n")
            count = sum(line != "" and not line.startswith("#version") for line in lines)
            if count < (needed := Tokenizer(bpe).get_vocab_size() - len(pre_tokenizers.ByteLevel.alphabet())):
                raise ValueError(f"{merges.name} has {count} merges, and the tokens of {vocab.name} need {needed}")
            values = read_json(config)
            if not (isinstance(values, dict) and isinstance(added := values.get("added_tokens_decoder"), dict)):
                raise TypeError(f"{config.name} has no added_tokens_decoder")
            specials = sorted((int(index), entry["content"], entry["special"]) for index, entry in added.items())
            tokens = [AddedToken(content, special=special, normalized=False) for _, content, special in specials]
            if not all(isinstance(content, str) for _, content, _ in specials):
                raise TypeError("the content of an added token is no text")
        except Exception as error:  # the tokenizers library raises bare Exception for malformed files
            raise LanceError(f"tokenizer files in {folder} are not usable ({reason(error)}): copy them again") from None
        self._tokenizer = Tokenizer(bpe)
        self._tokenizer.normalizer = normalizers.NFC()
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PROMPT_DATA["pretokenizer"]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        self._tokenizer.decoder = decoders.ByteLevel()
        for (index, content, special), token in zip(specials, tokens, strict=True):
            (self._tokenizer.add_special_tokens if special else self._tokenizer.add_tokens)([token])
            if self._tokenizer.token_to_id(content) != index:
                raise LanceError(f"{config}: '{content}' cannot have id {index}")

    def __len__(self) -> int:
        """Number of ids, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with nothing added around them."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], control_tokens: bool = False) -> str:
        """Text of token ids; control tokens are left out unless asked for."""
        return self._tokenizer.decode(ids, skip_special_tokens=not control_tokens)

    def stream(self) -> Callable[[int], str]:
        """A function that takes one id after the other and returns the text that each one completes, control tokens
        left out: empty while the bytes of a character are not all there."""
        stream = decoders.DecodeStream(skip_special_tokens=True)
        return lambda index: stream.step(self._tokenizer, index) or ""

    def check(self, config: LanceConfig) -> None:
        """Raise LanceError where the ids contradict llm_config.json, which would look up foreign embeddings."""
        if len(self) > config.vocab_size:
            raise LanceError(
                f"the tokenizer has {len(self)} ids, but llm_config.json has vocab_size {config.vocab_size}"
            )
        for token, index in config.special_tokens.items():
            if self.token_id(token) != index:
                raise LanceError(f"{token} is {self.token_id(token)} in the tokenizer, but {index} in llm_config.json")

    def token_id(self, token: str) -> int:
        """Id of one control token; raises LanceError when the tokenizer lacks it."""
        index = self._tokenizer.token_to_id(token)
        if index is None:
            raise LanceError(f"the tokenizer has no '{token}': it is not a Qwen2.5-VL tokenizer")
        return index

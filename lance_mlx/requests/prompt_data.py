"""The strings that Lance was trained with, from data/prompts.json (attribution in NOTICE)."""

import json
from importlib.resources import files

PROMPT_DATA: dict = json.loads(files("lance_mlx").joinpath("data/prompts.json").read_text(encoding="utf-8"))

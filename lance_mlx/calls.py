"""The calls of a run that somebody who looks on from outside may want to see or to steer, by name, as data.

A name stands for a function of a module or a method of a class ("module:function" or "module:Class.method", as
pkgutil.resolve_name takes them), which is looked up where it is called, so that what is put in its place takes effect.
Modules have their paths in the checkpoint instead and are not named here, but for those that are called once for each
reading of a pass.
"""

_MODEL, _FLOW, _TEXT = "lance_mlx.model", "lance_mlx.sampling.flow", "lance_mlx.sampling.text"

CALLS: dict[str, str] = {
    # What a request becomes: a Sequence of segments, the index at which an answer begins, its positions and times.
    "sequence to draw": "lance_mlx.pipeline:build_sequence",
    "sequence to answer": "lance_mlx.pipeline:build_question",
    "answer start": "lance_mlx.pipeline:answer_start",
    "positions to draw": f"{_FLOW}:position_ids",
    "positions to answer": f"{_TEXT}:rope_index",
    "unconditional sequence": f"{_FLOW}:unconditional",
    "unconditional positions": f"{_FLOW}:unconditional_position_ids",
    "times": f"{_FLOW}:timesteps",
    "is guided": f"{_FLOW}:is_guided",
    # The prefix, embedded segment by segment and read into caches by arm; then steps, or tokens.
    "prefix to draw": f"{_FLOW}:embed_prefix",
    "prefix to answer": f"{_TEXT}:embed_prefix",
    "prefill": "lance_mlx.sampling.conditions:GuidanceArm.prefill",
    "step": f"{_FLOW}:velocities_of_pass",
    "initial state": f"{_FLOW}:initial_state",
    "guided velocity": f"{_FLOW}:guided_velocity",
    "next state": f"{_FLOW}:advance",
    "token": f"{_TEXT}:AnswerDecoder.decode",
    "chosen token": f"{_TEXT}:_choose",
    "looks ahead": f"{_TEXT}:looks_ahead",
    # Inside a pass.
    "transformer": f"{_MODEL}.mot:MoTModel.__call__",
    "rotation": f"{_MODEL}.rope:Rotary.__call__",
    "attention": f"{_MODEL}.mot:ScaledDotProductAttention.__call__",
    "fused products": f"{_MODEL}.layers:FusedLinear.__call__",
    "rows of products": f"{_MODEL}.layers:by_rows",
    "rows of layers": f"{_MODEL}.mot:by_rows",
    "time embedding": f"{_MODEL}.lance:TimestepEmbedder.__call__",
    "latent positions": f"{_MODEL}.lance:LatentPositionEmbedding.__call__",
    # Pictures in and out.
    "ViT": f"{_MODEL}.vit:VisionTransformer.__call__",
    "encode": f"{_MODEL}.vae:VAE.encode",
    "encoded chunk": f"{_MODEL}.vae_encoder:Encoder.__call__",
    "sampled latent": f"{_MODEL}.vae:LatentStatistics.sample",
    "decoded chunk": f"{_MODEL}.vae_decoder:Decoder.__call__",
}

"""The models that load, family by family, and the tests that prove it: the table of docs/models.md.

`python -m reference.families` writes the table; a test compares it, and looks for every test that a row names.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
START, END = "<!-- families -->\n", "<!-- end of families -->"


class Family(NamedTuple):
    """A row: the models, what differs from Qwen2.5's, what is read, and tests as "file::function"."""

    models: str
    differs: str
    folder: str
    gguf: str
    tests: tuple[str, ...]


_GOLDEN = "tests/model/test_golden.py::test_logits_equal_stored_ones_of_transformers"
_REAL = "tests/test_real_model.py::test_greedy_ids_equal_transformers"
_GGUF = "tests/model/test_model.py::test_every_file_type_gives_the_logits_of_gguf_py_s_values"
_YARN = "tests/model/test_yarn.py::test_logits_past_the_trained_context_equal_transformers"
_WINDOW = "tests/model/test_model.py::test_sliding_window_and_yarn_equal_transformers"
_VARIANTS, _PACKED = "tests/loading/test_variants.py::", "tests/loading/test_packings.py::"
_FIELDS = f"{_VARIANTS}test_fields_that_config_json_leaves_out_are_transformers_s"
_PEERS, _ENCODING = "tests/loading/test_packings_peers.py::", "tests/encoding/test_encoding.py::"
_EXACT = f"{_PACKED}test_packed_values_are_the_same_bit_for_bit"
_DENSE = f"{_PACKED}test_dense_values_are_the_definition_s"

FAMILIES = (
    Family(
        "Qwen2, Qwen2.5, Coder, QwQ, and tunes of these shapes (R1-Distill, OpenThinker, Sky-T1, Arcee, Dolphin, ...)",
        "sizes",
        "yes",
        "yes",
        (_GOLDEN, _REAL, _GGUF),
    ),
    Family("Math", "`rope_theta` 10,000", "yes", "yes", (_FIELDS,)),
    Family("models with YaRN or a sliding window", "rope scaling, window", "yes", "yes", (_YARN, _WINDOW)),
    Family("Qwen1.5", "as many key and value heads as heads", "yes", "", (_FIELDS,)),
    Family("AWQ", "packed", "same bits in MLX", "", (_EXACT, f"{_PEERS}test_mlx_lm_reads_the_same_awq_matrices")),
    Family("GPTQ of 2, 4 and 8 bits", "packed", "same bits in MLX; act-order: dense", "", (_EXACT, _DENSE)),
    Family(
        "compressed-tensors w4a16, w8a16, w8a8",
        "packed",
        "same bits in MLX; act-order: dense",
        "",
        (_EXACT, f"{_PEERS}test_transformers_reads_the_same_model", f"{_PEERS}test_compressed_tensors_unpacks_int8"),
    ),
    Family("FP8, NVFP4, MXFP4", "packed", "dense", "", (_DENSE, f"{_PEERS}test_compressed_tensors_unpacks_nvfp4")),
    Family(
        "bitsandbytes NF4, FP4, int8",
        "packed",
        "dense",
        "",
        (_DENSE, f"{_PEERS}test_transformers_reads_the_same_model", f"{_PEERS}test_bitsandbytes_unpacks_int8"),
    ),
    Family("mlx-lm's own packings", "packed", "yes", "", (f"{_PACKED}test_mlx_s_own_modes",)),
    Family(
        "merges and tunes with other tensors",
        "[see above](#checkpoints-that-differ-from-a-plain-qwen2)",
        "yes",
        "biases, fused q, k and v",
        (
            f"{_VARIANTS}test_the_same_model",
            f"{_VARIANTS}test_biases_that_are_not_zero_are_added",
            f"{_VARIANTS}test_gguf",
        ),
    ),
    Family(
        "gte-Qwen2, stella, jina-code-embeddings",
        "no language head; attention both ways",
        "`embed`",
        "",
        (
            f"{_ENCODING}test_the_last_token_normalised_is_transformers_s",
            f"{_ENCODING}test_a_bidirectional_model_sees_what_comes_later",
            f"{_ENCODING}test_a_projection_after_pooling",
        ),
    ),
    Family(
        "`Qwen2ForSequenceClassification`: classifiers, rerankers, reward models",
        "classification head",
        "`score`",
        "",
        (f"{_ENCODING}test_scores_are_transformers_s",),
    ),
    Family(
        "Qwen2.5-Math-RM, Qwen2.5-Math-PRM",
        "reward head of two layers",
        "`score`",
        "",
        (
            f"{_ENCODING}test_a_reward_model_of_two_layers",
            f"{_ENCODING}test_a_process_reward_model_scores_each_step",
        ),
    ),
)


def table() -> str:
    """The table in Markdown."""
    lines = ["| models | differ in | folder | GGUF | proved by |", "|---|---|---|---|---|"]
    for family in FAMILIES:
        proofs = "<br>".join(f"`{test.partition('::')[2]}`" for test in family.tests)
        lines.append(f"| {family.models} | {family.differs} | {family.folder} | {family.gguf or '–'} | {proofs} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes the table into the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    PAGE.write_text(f"{before}{START}{table()}{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()

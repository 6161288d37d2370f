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
    """A row: the models, what differs from Qwen2.5's, what is read, tests as "file::function", and what a conversation
    has: the template, ends and sampling where neither file nor folder says another."""

    models: str
    differs: str
    folder: str
    gguf: str
    tests: tuple[str, ...]
    conversation: str = ""


_GOLDEN = "tests/model/test_golden.py::test_logits_equal_stored_ones_of_transformers"
_REAL = "tests/test_real_model.py::test_greedy_ids_equal_transformers"
_GGUF = "tests/model/test_model.py::test_every_file_type_gives_the_logits_of_gguf_py_s_values"
_YARN = "tests/model/test_yarn.py::test_logits_past_the_trained_context_equal_transformers"
_WINDOW = "tests/model/test_model.py::test_sliding_window_and_yarn_equal_transformers"
_TEMPLATES = "tests/text/test_chat_templates.py::test_text_and_ids_equal_transformers"
_TOKENS, _THINKING = "tests/text/test_special_tokens.py::", "tests/text/test_thoughts.py::"
_ENDS, _BOS = f"{_TOKENS}test_ends_are_known_by_their_meaning", f"{_TOKENS}test_bos_of_a_template_is_in_every_chat_once"
_SAMPLING = "tests/loading/test_sampling_defaults.py::test_a_gguf_without_settings_has_its_familys"
_THOUGHTS = "tests/generation/test_reasoning.py::test_thought_and_answer_are_told_apart"
_VARIANTS, _PACKED = "tests/loading/test_variants.py::", "tests/loading/test_packings.py::"
_FIELDS = f"{_VARIANTS}test_fields_that_config_json_leaves_out_are_transformers_s"
_PEERS, _ENCODING = "tests/loading/test_packings_peers.py::", "tests/encoding/test_encoding.py::"
_GGUF_ENCODING, _LONG = "tests/encoding/test_gguf_encoders.py::", "tests/loading/test_long_context.py::"
_EXACT = f"{_PACKED}test_packed_values_are_the_same_bit_for_bit"
_DENSE = f"{_PACKED}test_dense_values_are_the_definition_s"

FAMILIES = (
    Family(
        "Qwen2, Qwen2.5 and tunes of these shapes (Arcee, Dolphin, Kimi-Dev, xLAM-2, ...)",
        "sizes",
        "yes",
        "yes",
        (_GOLDEN, _REAL, _GGUF, _TEMPLATES, _SAMPLING),
        "ChatML; `<\\|im_end\\|>`, `<\\|endoftext\\|>`; 0.7, top-p 0.8, top-k 20, repetition 1.05; base models greedy",
    ),
    Family(
        "Coder",
        "[fill in the middle](fill.md)",
        "yes",
        "yes",
        (_REAL, _ENDS),
        "as above; `<\\|fim_pad\\|>`, `<\\|repo_name\\|>`, `<\\|file_sep\\|>` end a text, too",
    ),
    Family(
        "QwQ",
        "thinks",
        "yes",
        "yes",
        (_TEMPLATES, _SAMPLING, _THOUGHTS),
        "ChatML that opens a thought; 0.6, top-p 0.95, top-k 40",
    ),
    Family(
        "R1-Distill and its descendants (OpenThinker, OpenReasoning, AceReason, DeepScaleR, DeepCoder, ...)",
        "thinks; BOS in chats",
        "yes",
        "yes",
        (_TEMPLATES, _BOS, _SAMPLING, _THOUGHTS),
        "DeepSeek's with BOS, or ChatML; `<｜end▁of▁sentence｜>`, too; 0.6, top-p 0.95",
    ),
    Family(
        "Sky-T1, s1, Marco-o1, Bespoke-Stratos",
        "thinks in marks of its own",
        "yes",
        "yes",
        (_SAMPLING, f"{_THINKING}test_marks_are_found_in_the_tokens_or_the_template"),
        "ChatML; 0.7, top-p 0.8, top-k 20, repetition 1.05",
    ),
    Family("Math", "`rope_theta` 10,000", "yes", "yes", (_FIELDS,)),
    Family(
        "models with YaRN or a sliding window",
        "rope scaling, window",
        "yes",
        "yes",
        (_YARN, _WINDOW, "tests/model/test_yarn.py::test_settings_of_deepseek_s_yarn_equal_transformers"),
    ),
    Family(
        "Qwen2.5-1M",
        "dual chunk attention, which is plain attention up to 262,144 tokens: the context is cut there",
        "yes",
        "yes",
        (
            f"{_LONG}test_dual_chunk_attention_is_plain_attention_up_to_its_chunk",
            f"{_LONG}test_the_context_of_a_folder_ends_where_dual_chunk_attention_begins",
            f"{_LONG}test_a_folder_or_gguf_that_has_lost_the_setting_is_known_by_its_context",
            f"{_LONG}test_rope_scaling_beside_dual_chunk_attention_says_the_context_that_it_gives",
        ),
    ),
    Family(
        "Qwen1.5",
        "as many key and value heads as heads; GGUFs without `tokenizer.ggml.pre`",
        "yes",
        "yes",
        (_FIELDS, f"{_TOKENS}test_old_files_without_the_name_of_the_split_rule_load_with_a_sentence", _SAMPLING),
        "ChatML; Chat 0.7, top-p 0.8, top-k 20, repetition 1.05",
    ),
    Family(
        "CodeQwen1.5",
        "SentencePiece's vocabulary",
        "yes",
        "yes",
        (
            f"{_TOKENS}test_a_sentencepiece_vocabulary_gives_sentencepiece_s_ids",
            f"{_TOKENS}test_a_sentencepiece_vocabulary_is_saved_for_transformers",
        ),
        "ChatML",
    ),
    Family("AWQ", "packed", "same bits in MLX", "", (_EXACT, f"{_PEERS}test_mlx_lm_reads_the_same_awq_matrices")),
    Family("GPTQ and AutoRound, 2, 4, 8 bits", "packed", "same bits in MLX; act-order: dense", "", (_EXACT, _DENSE)),
    Family(
        "compressed-tensors w4a16, w8a16, w8a8",
        "packed",
        "same bits in MLX; act-order: dense",
        "",
        (_EXACT, f"{_PEERS}test_transformers_reads_the_same_model", f"{_PEERS}test_compressed_tensors_unpacks_int8"),
    ),
    Family(
        "FP8, NVFP4, MXFP4",
        "packed",
        "dense",
        "NVFP4, MXFP4",
        (
            _DENSE,
            f"{_PEERS}test_compressed_tensors_unpacks_nvfp4",
            f"{_VARIANTS}test_a_gguf_s_factor_of_a_matrix",
        ),
    ),
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
            f"{_VARIANTS}test_a_head_with_a_bias",
            f"{_VARIANTS}test_a_tied_model_whose_only_matrix_is_its_head_is_transformers_s",
            f"{_VARIANTS}test_a_classification_head_beside_a_language_head_is_chosen_by_the_architecture",
            f"{_VARIANTS}test_gguf",
        ),
    ),
    Family(
        "gte-Qwen2, stella, jina-code-embeddings",
        "no language head; attention both ways",
        "`embed`",
        "`embed`",
        (
            f"{_ENCODING}test_the_last_token_normalised_is_transformers_s",
            f"{_ENCODING}test_a_bidirectional_model_sees_what_comes_later",
            f"{_ENCODING}test_a_projection_after_pooling",
            f"{_GGUF_ENCODING}test_the_pooling_is_the_file_s",
            f"{_GGUF_ENCODING}test_a_file_whose_attention_is_not_causal_sees_what_comes_later",
        ),
    ),
    Family(
        "`Qwen2ForSequenceClassification`: classifiers, rerankers, reward models",
        "classification head",
        "`score`",
        "`score`",
        (
            f"{_ENCODING}test_scores_are_transformers_s",
            f"{_GGUF_ENCODING}test_a_classification_head_gives_the_folder_s_scores",
            f"{_GGUF_ENCODING}test_a_pair_is_what_llama_cpp_s_server_makes_of_it",
        ),
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
    lines = ["| models | differ in | folder | GGUF | template; ends; sampling | proved by |", "|---" * 6 + "|"]
    for family in FAMILIES:
        proofs = "<br>".join(f"`{test.partition('::')[2]}`" for test in family.tests)
        cells = (family.models, family.differs, family.folder, family.gguf, family.conversation)
        lines.append("| " + " | ".join(cell or "–" for cell in cells) + f" | {proofs} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes the table into the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    PAGE.write_text(f"{before}{START}{table()}{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()

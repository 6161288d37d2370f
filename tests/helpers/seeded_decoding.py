"""Seeded defects of the kernels that decoding one token launches."""

from __future__ import annotations

from reference.emulator import DataRace, OutOfBounds, UninitialisedRead, UnwrittenOutput

from .seeded import BARRIER, RACE, Edit, WrongNumbers

# name: (call of decoding_calls.py that must fail, the change)
EDITS: dict[str, tuple[str, Edit]] = {
    "norm before the product without its barriers": ("matvec dense", Edit("matvec.h", BARRIER, "", RACE)),
    "sums of several simdgroups without their barriers": ("matvec dense, split", Edit("matvec.h", BARRIER, "", RACE)),
    "attend without its barriers": ("attend", Edit("decode_attention.h", BARRIER, "", RACE)),
    "matvec: rows beyond the last": (
        "matvec q4_k",
        Edit("matvec.metal", " && row < uint(ROWS)", "", (OutOfBounds, UninitialisedRead)),
    ),
    "a unit of more rows than are left": (
        "matvec q4_k",
        Edit("rows.h", "i = i < uint(COUNT) ? i : uint(COUNT - 1);", "", OutOfBounds),
    ),
    "matvec_qkv: the tail copied over the new token": (
        "matvec_qkv dense",
        Edit("qkv.h", "if (i / uint(2 * HALF) % uint(SLOTS) != slot) {", "{", DataRace),
    ),
    "matvec_qkv: tail not copied": (
        "matvec_qkv dense",
        Edit("qkv.h", "store<T>(new_recent_kv, i, load<N>(recent_kv, i));", "", UnwrittenOutput),
    ),
    "attend_split: sums of weights not stored": (
        "attend_split",
        Edit("decode_attention_split.metal", "stats[2u * at + 1u] = all.total;", "", UnwrittenOutput),
    ),
    "matvec: the first simdgroup's sum only": (
        "matvec dense, split",
        Edit("matvec.h", "for (int s = 0; s < SPLIT; ++s) {", "for (int s = 0; s < 1; ++s) {", WrongNumbers),
    ),
    "matvec_swiglu: gate by gate": (
        "matvec_swiglu dense",
        Edit("silu.h", "float(T(activated)) * up", "float(T(activated)) * gate", WrongNumbers),
    ),
    "matvec_qkv: second half turned the wrong way": (
        "matvec_qkv dense",
        Edit("qkv.h", "rotated(b, -a,", "rotated(b, a,", WrongNumbers),
    ),
    "matvec_qkv: the second matrix from the first one's unit on": (
        "matvec_qkv mixed",
        Edit("matvec_qkv.metal", "(unit - uint(UNITS1))", "(unit)", (OutOfBounds, WrongNumbers)),
    ),
    "affine: a code's bits in the second word lost": (
        "matvec_qkv mixed",
        Edit("affine.h", "(words.v[(word + 1) % BITS] << uint(32 - shift))", "0u", WrongNumbers),
    ),
    "Q4_K: upper bits of later scales lost": (
        "matvec q4_k",
        Edit("q4_k.h", "(tops & 0x0f0fu) | ((scale >> 2) & 0x3030u)", "(tops & 0x0f0fu)", WrongNumbers),
    ),
    "Q4_K: minimum of the wrong group": (
        "unpack q4_k",
        Edit("q4_k.h", "const uint middle = (head.z >> shift)", "const uint middle = head.z", WrongNumbers),
    ),
    "Q6_K: highest bit only": ("matvec q6_k", Edit("q6_k.h", "0x00030003u <<", "0x00020002u <<", WrongNumbers)),
    "codes of even bytes for those of odd ones": (
        "matvec affine4",
        Edit("rows.h", "halves(above & mask)", "halves(word & mask)", WrongNumbers),
    ),
    "affine unpacked: a code's bits in the second word lost": (
        "unpack affine5",
        Edit("affine.h", "code |= w[word + 1u] << (32u - bit % 32u);", "", WrongNumbers),
    ),
    "tiles: sums of several simdgroups without their barriers": (
        "matvec q4_k, long, tiles",
        Edit("nvidia/tile_sums.h", BARRIER, "", RACE),
    ),
    "tiles: codes of the first row for both": (
        "matvec affine4, tiles",
        Edit("nvidia/tiles.h", "first_low, second_low,", "first_low, first_low,", WrongNumbers),
    ),
    "tiles: the vector in the columns of all groups": (
        "matvec affine4, tiles",
        Edit("nvidia/affine_tiles.h", " && from % 256u / uint(GROUP) == g", "", WrongNumbers),
    ),
    "tiles: the vector read beyond its end": (
        "matvec affine4, ragged, tiles",
        Edit("nvidia/affine_tiles.h", "from < uint(K) && ", "", (OutOfBounds, UninitialisedRead)),
    ),
    "tiles: codes read beyond the matrix": (
        "matvec affine4, ragged, tiles",
        Edit("nvidia/tiles.h", "piece < pieces ? piece : 0u", "piece", OutOfBounds),
    ),
    "tiles: sums of half of the lanes": (
        "matvec affine4, ragged, tiles",
        Edit("nvidia/tile_sums.h", "sums.v[r] += metal::simd_shuffle_xor(sums.v[r], ushort(2));", "", WrongNumbers),
    ),
    "tiles: a stage read before all lanes have copied it": (
        "matvec q4_k, long, tiles",
        Edit(
            "nvidia/tile_sums.h",
            "metal::simdgroup_barrier(metal::mem_flags::mem_threadgroup);\n      start_stage",
            "start_stage",
            RACE,
        ),
    ),
    "tiles: a ring of one stage": (
        "matvec q6_k, long, tiles",
        Edit("nvidia/tile_sums.h", "n % uint(DEPTH) * uint(RING);\n    if", "0u;\n    if", RACE),
    ),
    "tiles: rows do not take turns when they are read": (
        "matvec affine4, tiles",
        Edit("nvidia/affine_tiles.h", "piece_word(g, s * 4u + t)", "(g * 8u + s * 4u + t) * 4u", WrongNumbers),
    ),
    "tiles: the vector staged in its own order": (
        "matvec q4_k, tiles",
        Edit("nvidia/tiles.h", "return k / 4 * 4 + k % 2 * 2 + k / 2 % 2;", "return k;", WrongNumbers),
    ),
    "tiles: a neighbour's sums of the vector": (
        "matvec q6_k, tiles",
        Edit("nvidia/q6_k_tiles.h", "h * 8u + t * 2u]", "t * 2u]", WrongNumbers),
    ),
    "tiles: scales of the first rows for the others": (
        "matvec affine4, tiles",
        Edit("nvidia/affine_tiles.h", "((g + r * 8u) * uint(PAIRS)", "(g * uint(PAIRS)", WrongNumbers),
    ),
    "tiles: 128 not taken away": (
        "matvec_swiglu q4_k, tiles",
        Edit("nvidia/tiles.h", "IsBfloat<T>::value ? 128.0f : 0.0f", "0.0f", WrongNumbers),
    ),
    "Q4_K tiles: low codes for high ones": (
        "matvec q4_k, tiles",
        Edit("nvidia/q4_k_tiles.h", "second[i + k], 4, 12,", "second[i + k], 0, 12,", WrongNumbers),
    ),
    "Q6_K tiles: the first lanes' high bits for all": (
        "matvec q6_k, tiles",
        Edit("nvidia/q6_k_tiles.h", "first_top[i + k] >> (t / 2u * 2u)", "first_top[i + k]", WrongNumbers),
    ),
    "matvec_qkv: units of two matrices in one threadgroup": (
        "matvec_qkv q4_k and q6_k, tiles",
        Edit("nvidia/matvec_qkv.metal", "unit >= uint(UNITS1)", "unit > uint(UNITS1)", (OutOfBounds, WrongNumbers)),
    ),
    "attend: a key too few in the window": (
        "attend",
        Edit("decode_attention.h", "? end - uint(WINDOW) : 0u", "? end - uint(WINDOW) + 1u : 0u", WrongNumbers),
    ),
    "matmul without its barrier": ("matmul", Edit("nvidia/matmul.metal", BARRIER, "", RACE)),
    "matmul: outputs beyond the last": (
        "matmul",
        Edit("nvidia/matmul.metal", "if (column < uint(N)) {", "{", OutOfBounds),
    ),
    "matmul: rows beyond the last": (
        "matmul",
        Edit("nvidia/matmul.h", "row = row < count ? row : count - 1u;", "", OutOfBounds),
    ),
    "matmul: steps beyond the last": (
        "matmul",
        Edit("nvidia/matmul.h", "if (start + uint(d) < uint(K / 32)) {", "{", OutOfBounds),
    ),
    "matmul: a step's first half twice": (
        "matmul, 20 rows",
        Edit("nvidia/matmul.h", "first[d][h * 2 + 1]", "first[d][h * 2]", WrongNumbers),
    ),
    "matmul: the first part's sum only": (
        "matmul, 20 rows",
        Edit("nvidia/matmul.metal", "for (int s = 0; s < SPLIT; ++s) {", "for (int s = 0; s < 1; ++s) {", WrongNumbers),
    ),
    "matmul: results of the first tile for all": (
        "matmul, 20 rows",
        Edit("nvidia/matmul.metal", "sums.tiles[tile].v[i]", "sums.tiles[0].v[i]", WrongNumbers),
    ),
    "packed product: a stage multiplied before it has come": (
        "multiply q4_k",
        Edit("nvidia/matmul_packed.metal", BARRIER, "", RACE),
    ),
    "packed product: the next half of x over the one that is read": (
        "multiply q6_k",
        Edit(
            "nvidia/packed_rows.h",
            "start_copy<4>(x, half_stage % 2u * WORDS + i",
            "start_copy<4>(x, i",
            (DataRace, WrongNumbers),
        ),
    ),
    "packed product: the first part only": (
        "multiply q4_k",
        Edit("nvidia/add_parts.metal", "s < SPLITS", "s < 1", WrongNumbers),
    ),
    "packed product: a row beyond x's": (
        "multiply q4_k",
        Edit("nvidia/arrange.metal", "if (row < uint(x_shape[0])) {", "{", OutOfBounds),
    ),
    "packed product: sums of one group for all": (
        "multiply q4_k",
        Edit("nvidia/packed_rows.h", "from + (group * uint(TILES)", "from + (0u * uint(TILES)", WrongNumbers),
    ),
    "packed product: Q6_K's upper bits of another quarter": (
        "multiply q6_k",
        Edit("nvidia/q6_k_rows.h", "high >> (quarter * 2u)", "high", WrongNumbers),
    ),
    "packed product: Q6_K's scales of the other half": (
        "multiply q6_k",
        Edit("nvidia/q6_k_rows.h", "row * 4u + half_stage * 2u + quarter", "row * 4u + quarter", WrongNumbers),
    ),
    "attend_split on tiles without its barrier": (
        "attend_split, tiles",
        Edit("nvidia/decode_attention_split.metal", BARRIER, "", RACE),
    ),
    "attend_split on tiles: a key beyond the last": (
        "attend_split, tiles",
        Edit(
            "nvidia/attention_tiles.h",
            "uint(tile * 8 + i) + t * 2u < end ?",
            "uint(tile * 8 + i) + t * 2u < end + 1u ?",
            WrongNumbers,
        ),
    ),
    "attend_split on tiles: weights rounded": (
        "attend_split, tiles",
        Edit("nvidia/decode_attention_split.metal", " + a.sums[tile].v[i + 2]", "", WrongNumbers),
    ),
    "attend_split on tiles: each second value of the row before": (
        "attend_split, tiles",
        Edit("nvidia/attention_tiles.h", "uint(r / 2 * 8 + r % 2)", "uint(r / 2 * 8)", WrongNumbers),
    ),
    "best_parts without its barrier": ("best_token", Edit("best_parts.metal", BARRIER, "", RACE)),
    "best_parts: the last part ends early": (
        "best_token",
        Edit(
            "best_parts.metal",
            "most < uint(COUNT) ? most : uint(COUNT)",
            "most < uint(COUNT) ? most : 999u",
            WrongNumbers,
        ),
    ),
    "best: of equal ones the last": (
        "best_token",
        Edit("best.h", "b.index < a.index", "b.index > a.index", WrongNumbers),
    ),
    "best: negative numbers in the order of their bits": (
        "best_token",
        Edit("best.h", "size | 0x80000000u : ~bits", "size | 0x80000000u : bits | 0x80000000u", WrongNumbers),
    ),
    "best: infinity is a number": (
        "best_token",
        Edit("best.h", "size >= 0x7f800000u", "size > 0x7f800000u", WrongNumbers),
    ),
    "best_token: half of the parts": (
        "best_token",
        Edit("best_token.metal", "part += uint(SIMD_WIDTH)", "part += uint(2 * SIMD_WIDTH)", WrongNumbers),
    ),
    "attend: a row sees its padding": (
        "attend rows",
        Edit("decode_attention.h", "metal::max(first, WINDOW", "metal::max(0u, WINDOW", WrongNumbers),
    ),
    "attend: another row's padding": (
        "attend rows",
        Edit("decode_attention.metal", "uint(first[batch])", "uint(first[0])", WrongNumbers),
    ),
    "attend: every row on the first one's keys": (
        "attend rows",
        Edit(
            "decode_attention.metal",
            "batch * uint(KV) + query / uint(RATIO)",
            "query / uint(RATIO) % uint(KV)",
            WrongNumbers,
        ),
    ),
    "attend_split: a row on the values of the row before": (
        "attend_split rows",
        Edit("decode_attention_split.metal", "batch * uint(KV) + head", "head", (WrongNumbers, OutOfBounds)),
    ),
    "attend: keys that are not there": (
        "attend",
        Edit(
            "decode_attention.h",
            "lane_row < end ? dot * scale : -INFINITY",
            "lane_row <= end ? dot * scale : -INFINITY",
            WrongNumbers,
        ),
    ),
    "combine: sums of weights not rescaled": (
        "attend_split",
        Edit(
            "combine.metal",
            "metal::fma(factor, stats[2u * at + 1u], total)",
            "stats[2u * at + 1u] + total",
            WrongNumbers,
        ),
    ),
}

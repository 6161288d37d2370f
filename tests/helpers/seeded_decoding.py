"""Seeded defects of the kernels that decoding one token launches."""

from __future__ import annotations

from reference.emulator import DataRace, OutOfBounds, UninitialisedRead, UnwrittenOutput

from .seeded import BARRIER, RACE, Edit, WrongNumbers

# name: (call of decoding_calls.py that must fail, the change)
EDITS: dict[str, tuple[str, Edit]] = {
    "norm before the product without its barriers": ("matvec dense", Edit("matvec.h", BARRIER, "", RACE)),
    "sums of several simdgroups without their barriers": ("matvec dense, split", Edit("matvec.h", BARRIER, "", RACE)),
    "attend without its barriers": ("attend", Edit("attend.h", BARRIER, "", RACE)),
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
        Edit("matvec_qkv.metal", "if (i / uint(2 * HALF) % uint(TAIL) != slot) {", "{", DataRace),
    ),
    "matvec_qkv: tail not copied": (
        "matvec_qkv dense",
        Edit("matvec_qkv.metal", "store<T>(new_tail, i, load<N>(tail, i));", "", UnwrittenOutput),
    ),
    "attend_split: sums of weights not stored": (
        "attend_split",
        Edit("attend_split.metal", "stats[2u * at + 1u] = all.total;", "", UnwrittenOutput),
    ),
    "matvec: the first simdgroup's sum only": (
        "matvec dense, split",
        Edit("matvec.h", "for (int s = 0; s < SPLIT; ++s) {", "for (int s = 0; s < 1; ++s) {", WrongNumbers),
    ),
    "matvec_swiglu: gate by gate": (
        "matvec_swiglu dense",
        Edit("matvec_swiglu.metal", "float(T(activated)) * up", "float(T(activated)) * gate", WrongNumbers),
    ),
    "matvec_qkv: second half turned the wrong way": (
        "matvec_qkv dense",
        Edit("matvec_qkv.metal", "b = rotated(b, -a,", "b = rotated(b, a,", WrongNumbers),
    ),
    "matvec_qkv: the second matrix from the first one's unit on": (
        "matvec_qkv mixed",
        Edit("matvec_qkv.metal", "unit - UNITS1,", "unit,", (OutOfBounds, WrongNumbers)),
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
        Edit("q4_k.h", "const uint middle = (head.v[2] >> shift)", "const uint middle = head.v[2]", WrongNumbers),
    ),
    "Q6_K: highest bit only": ("matvec q6_k", Edit("q6_k.h", "top, 0x00600000u", "top, 0x00400000u", WrongNumbers)),
    "affine unpacked: a code's bits in the second word lost": (
        "unpack affine5",
        Edit("affine.h", "code |= w[word + 1u] << (32u - bit % 32u);", "", WrongNumbers),
    ),
    "tiles: sums of several simdgroups without their barriers": (
        "matvec q4_k, long, tiles",
        Edit("tile_sums.h", BARRIER, "", RACE),
    ),
    "tiles: codes of the first row for both": (
        "matvec affine4, tiles",
        Edit("tiles.h", "rows.v[1] = second_low;", "rows.v[1] = first_low;", WrongNumbers),
    ),
    "tiles: the vector in the columns of all groups": (
        "matvec affine4, tiles",
        Edit("affine_tiles.h", " && from % 256u / uint(GROUP) == g", "", WrongNumbers),
    ),
    "tiles: the vector read beyond its end": (
        "matvec affine4, ragged, tiles",
        Edit("affine_tiles.h", "from < uint(K) && ", "", (OutOfBounds, UninitialisedRead)),
    ),
    "tiles: codes read beyond the matrix": (
        "matvec affine4, ragged, tiles",
        Edit("tiles.h", "piece < pieces ? piece : 0u", "piece", OutOfBounds),
    ),
    "tiles: sums of half of the lanes": (
        "matvec affine4, ragged, tiles",
        Edit("tile_sums.h", "sums.v[r] += metal::simd_shuffle_xor(sums.v[r], ushort(2));", "", WrongNumbers),
    ),
    "tiles: a stage read before all lanes have copied it": (
        "matvec q4_k, long, tiles",
        Edit(
            "tile_sums.h",
            "metal::simdgroup_barrier(metal::mem_flags::mem_threadgroup);\n    start_stage",
            "start_stage",
            RACE,
        ),
    ),
    "tiles: a ring of one stage": (
        "matvec q6_k, long, tiles",
        Edit("tile_sums.h", "n % uint(DEPTH) * uint(RING);\n  if", "0u;\n  if", RACE),
    ),
    "tiles: rows do not take turns when they are read": (
        "matvec affine4, tiles",
        Edit("affine_tiles.h", "piece_word(g, s * 4u + t)", "(g * 8u + s * 4u + t) * 4u", WrongNumbers),
    ),
    "tiles: the vector staged in its own order": (
        "matvec q4_k, tiles",
        Edit("tiles.h", "return k / 4 * 4 + k % 2 * 2 + k / 2 % 2;", "return k;", WrongNumbers),
    ),
    "tiles: a neighbour's sums of the vector": (
        "matvec q6_k, tiles",
        Edit("q6_k_tiles.h", "h * 8u + t * 2u]", "t * 2u]", WrongNumbers),
    ),
    "tiles: scales of the first rows for the others": (
        "matvec affine4, tiles",
        Edit("affine_tiles.h", "((g + r * 8u) * PAIRS", "(g * PAIRS", WrongNumbers),
    ),
    "tiles: 128 not taken away": (
        "matvec_swiglu q4_k, tiles",
        Edit("tiles.h", "IsBfloat<T>::value ? 128.0f : 0.0f", "0.0f", WrongNumbers),
    ),
    "Q4_K tiles: low codes for high ones": (
        "matvec q4_k, tiles",
        Edit("q4_k_tiles.h", "two_codes<T>(a, 4), ", "two_codes<T>(a, 0), ", WrongNumbers),
    ),
    "Q6_K tiles: the first lanes' high bits for all": (
        "matvec q6_k, tiles",
        Edit("q6_k_tiles.h", "first_top.v[i + k] >> (t / 2u * 2u)", "first_top.v[i + k]", WrongNumbers),
    ),
    "matvec_qkv: units of two matrices in one threadgroup": (
        "matvec_qkv q4_k and q6_k, tiles",
        Edit("matvec_qkv.metal", "if (unit >= UNITS1) {", "if (unit > UNITS1) {", (OutOfBounds, WrongNumbers)),
    ),
    "attend: a key too few in the window": (
        "attend",
        Edit("attend.h", "? end - uint(WINDOW) : 0u", "? end - uint(WINDOW) + 1u : 0u", WrongNumbers),
    ),
    "matmul without its barrier": ("matmul", Edit("matmul.metal", BARRIER, "", RACE)),
    "matmul: outputs beyond the last": ("matmul", Edit("matmul.metal", "if (column < uint(N)) {", "{", OutOfBounds)),
    "matmul: rows beyond the last": (
        "matmul",
        Edit("matmul.h", "row = row < uint(COUNT) ? row : uint(COUNT - 1);", "", OutOfBounds),
    ),
    "matmul: steps beyond the last": (
        "matmul",
        Edit("matmul.h", "if (start + uint(d) < uint(K / 32)) {", "{", OutOfBounds),
    ),
    "matmul: a step's first half twice": (
        "matmul, 20 rows",
        Edit("matmul.h", "first[d].v[half_step * 2 + 1]", "first[d].v[half_step * 2]", WrongNumbers),
    ),
    "matmul: the first part's sum only": (
        "matmul, 20 rows",
        Edit("matmul.metal", "for (int s = 0; s < SPLIT; ++s) {", "for (int s = 0; s < 1; ++s) {", WrongNumbers),
    ),
    "matmul: results of the first tile for all": (
        "matmul, 20 rows",
        Edit("matmul.metal", "sums.tiles[tile].v[i]", "sums.tiles[0].v[i]", WrongNumbers),
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
        Edit("attend.h", "metal::max(least, WINDOW", "metal::max(0u, WINDOW", WrongNumbers),
    ),
    "attend: another row's padding": ("attend rows", Edit("attend.metal", "LEAST,", "uint(least[0]),", WrongNumbers)),
    "attend: every row on the first one's keys": (
        "attend rows",
        Edit("attend.metal", "batch * uint(KV) + query / uint(RATIO)", "query / uint(RATIO) % uint(KV)", WrongNumbers),
    ),
    "attend_split: a row on the values of the row before": (
        "attend_split rows",
        Edit("attend_split.metal", "batch * uint(KV) + head", "head", (WrongNumbers, OutOfBounds)),
    ),
    "attend: keys that are not there": (
        "attend",
        Edit(
            "attend.h",
            "lane_row < end ? dot * scale : float_of_bits(int(0xff800000u))",
            "lane_row <= end ? dot * scale : float_of_bits(int(0xff800000u))",
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

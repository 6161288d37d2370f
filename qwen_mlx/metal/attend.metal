// Attention of one token of each of B rows on the cache while it is short: a threadgroup for a query head.
// q (B, KV RATIO, D); kv (B, 2 KV, room, D) and tail (B, 2 KV, its room, D), keys first, T; place (2) int32: the token's
// position, and how many tokens lie before the tail. out (B, KV RATIO, D), T. LEAST: the first token that row `batch` sees.
// Template: T, KV, RATIO query heads of each, D, DEPTH rows a lane has under way, THREADS, WINDOW keys that are seen or 0
// for all, SCALE the bits of the scores' factor.
constexpr int SIMDS = THREADS / SIMD_WIDTH;
threadgroup float parts[SIMDS * D];
threadgroup float largest[SIMDS];
threadgroup float totals[SIMDS];

const uint id = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
const uint query = threadgroup_position_in_grid.y;
const uint batch = query / uint(KV * RATIO);
const Attended<1, 16 / sizeof(T)> a = attend_all<T, KV, 1, D, WINDOW, DEPTH>(
    q, query, kv, uint(kv_shape[2]), tail, uint(tail_shape[2]), uint(place[0]), uint(place[1]), LEAST,
    batch * uint(KV) + query / uint(RATIO), simd, uint(SIMDS), lane, float_of_bits(SCALE));
const Merged all = merged<1, 16 / sizeof(T), D, SIMDS>(a, 0, &parts[0], &largest[0], &totals[0], id, lane, simd);
if (id < uint(D)) {
  out[query * uint(D) + id] = T(all.sum / all.total);
}

// Attention of one token on the cache while it is short: a threadgroup for a query head.
// q (KV RATIO, D); kv (1, 2 KV, room, D) and tail (1, 2 KV, its room, D), keys first, T; place (2) int32: the token's
// position, and how many tokens lie before the tail. out (KV RATIO, D), T.
// Template: T, KV, RATIO query heads of each, D, DEPTH rows a lane has under way, THREADS, WINDOW keys that are seen or 0
// for all, SCALE the bits of the scores' factor.
constexpr int SIMDS = THREADS / SIMD_WIDTH;
threadgroup float parts[SIMDS * D];
threadgroup float largest[SIMDS];
threadgroup float totals[SIMDS];

const uint id = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
const uint head = threadgroup_position_in_grid.y;
const Attended<1, 16 / sizeof(T)> a = attend_all<T, KV, 1, D, WINDOW, DEPTH>(
    q, head, kv, uint(kv_shape[2]), tail, uint(tail_shape[2]), uint(place[0]), uint(place[1]), head / uint(RATIO), simd,
    uint(SIMDS), lane, float_of_bits(SCALE));
const Merged all = merged<1, 16 / sizeof(T), D, SIMDS>(a, 0, &parts[0], &largest[0], &totals[0], id, lane, simd);
if (id < uint(D)) {
  out[head * uint(D) + id] = T(all.sum / all.total);
}

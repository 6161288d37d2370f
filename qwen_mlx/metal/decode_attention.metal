// Attention of one token of each of B rows on a short cache. A threadgroup computes a query head.
// q (B, KV RATIO, D), T; kv (B, 2 KV, room, D) and recent_kv (B, 2 KV, its room, D), keys first, T; position (2) int32: the
// token's, and how many tokens lie before recent_kv. first (B) int32, where RAGGED: the first token that each row sees.
// out (B, KV RATIO, D), T. Template: T, KV, RATIO query heads to each, D, DEPTH rows that a lane loads at once, THREADS, WINDOW
// keys that are seen or 0 for all, SCALE the bits of the scores' factor, RAGGED.
constexpr int SIMDS = THREADS / SIMD_WIDTH;
threadgroup float parts[SIMDS * D];
threadgroup float largest[SIMDS];
threadgroup float totals[SIMDS];

const uint id = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
const uint query = threadgroup_position_in_grid.y;
const uint batch = query / uint(KV * RATIO);
const uint first_token = RAGGED ? uint(first[batch]) : 0u;
const auto a = attend<T, KV, 1, D, WINDOW, DEPTH>(
    q, query, kv, uint(kv_shape[2]), recent_kv, uint(recent_kv_shape[2]), uint(position[0]), uint(position[1]), first_token,
    batch * uint(KV) + query / uint(RATIO), simd, uint(SIMDS), lane, as_type<float>(SCALE));
const Merged all = merged<D, SIMDS>(a, 0, &parts[0], &largest[0], &totals[0], id, lane, simd);
if (id < uint(D)) {
  out[query * uint(D) + id] = T(all.sum / all.total);
}

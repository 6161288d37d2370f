// ../decode_attention_split.metal on tensor cores (attention_tiles.h): D is 64 or 128, T of 16 bits, GROUP = RATIO at most 8.
// Template: T, KV, RATIO, D, WINDOW, SCALE, RAGGED, THREADS, SPLITS.
constexpr int SIMDS = THREADS / SIMD_WIDTH;
constexpr int KEYS = 2048 / D;  // that a simdgroup reads at once: 4 KiB, and their values
threadgroup float parts[SIMDS * RATIO * D];
threadgroup float largest[SIMDS * RATIO];
threadgroup float totals[SIMDS * RATIO];

const uint lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
const uint split = threadgroup_position_in_grid.x;
const uint head = threadgroup_position_in_grid.y;
const uint query = head * uint(RATIO);
const uint batch = head / uint(KV);
const float scale = as_type<float>(SCALE);
const uint filled = uint(position[1]);
const uint end = uint(position[0]) + 1u;
const uint begin = first_seen<WINDOW>(RAGGED ? uint(first[batch]) : 0u, end);
const uint worker = split * uint(SIMDS) + simd;
const uint stride = uint(SPLITS * SIMDS * KEYS);
const uint keys = batch * uint(KV) + head;
const uint room = uint(kv_shape[2]);
const uint recent_room = uint(recent_kv_shape[2]);
const auto queries = tile_queries<T, RATIO, D>(q, query, lane);
auto a = attend_tiles<T, D, KEYS>(no_attention<D>(), queries, kv, keys * room, (uint(KV) + keys) * room,
                                  begin + worker * uint(KEYS), stride, filled, lane, scale);
// recent_kv's rows go to the last worker first: the first one has the most to do already.
a = attend_tiles<T, D, KEYS>(a, queries, recent_kv, keys * recent_room, (uint(KV) + keys) * recent_room,
                             (begin > filled ? begin - filled : 0u) + (uint(SPLITS * SIMDS - 1) - worker) * uint(KEYS), stride,
                             end - filled, lane, scale);
a.total += metal::simd_shuffle_xor(a.total, ushort(1));
a.total += metal::simd_shuffle_xor(a.total, ushort(2));
const uint mine = simd * uint(RATIO) + lane / 4u;
if (lane / 4u < uint(RATIO)) {
  if (lane % 4u == 0u) {
    largest[mine] = a.largest;
    totals[mine] = a.total;
  }
  UNROLL
  for (int tile = 0; tile < D / 8; ++tile) {
    UNROLL
    for (int i = 0; i < 2; ++i) {
      parts[mine * uint(D) + element(uint(tile), uint(i), lane)] = a.sums[tile].v[i] + a.sums[tile].v[i + 2];
    }
  }
}
metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
for (uint i = thread_position_in_threadgroup.x; i < uint(RATIO * D); i += uint(THREADS)) {
  const uint g = i / uint(D);
  float most = -INFINITY;
  UNROLL
  for (int s = 0; s < SIMDS; ++s) {
    most = metal::max(most, largest[uint(s * RATIO) + g]);
  }
  float sum = 0.0f;
  float total = 0.0f;
  UNROLL
  for (int s = 0; s < SIMDS; ++s) {
    const float share = weight_of(largest[uint(s * RATIO) + g], most);
    total = metal::fma(share, totals[uint(s * RATIO) + g], total);
    sum = metal::fma(share, parts[uint(s * RATIO * D) + i], sum);
  }
  const uint at = (query + g) * uint(SPLITS) + split;
  sums[at * uint(D) + i % uint(D)] = sum;
  if (i % uint(D) == 0u) {
    stats[2u * at] = most;
    stats[2u * at + 1u] = total;
  }
}

// Attention of one token's GROUP query heads on the key/value head that they share. LANES lanes of a simdgroup hold a row of keys
// or values, 16 bytes each, so that a simdgroup reads several neighbouring rows at once. Each LANES lanes keep a running softmax
// of their own (Milakov and Gimelshein 2018, algorithm 3); `merged` joins them.
template <int GROUP, int N>
struct Attention {
  float largest[GROUP];  // of the scores so far
  float total[GROUP];    // of the weights
  Pack<N> sum[GROUP];    // of the weighted values
};

// The same for one query head of a whole threadgroup; `sum` is that of this thread's element.
struct Merged {
  float largest, total, sum;
};

template <int GROUP, int N>
struct Queries {
  Pack<N> v[GROUP];
};

// While all scores are -inf their weights are 0: -inf minus -inf would be NaN.
FUNCTION float weight_of(float score, float largest) {
  return largest == -INFINITY ? 0.0f : metal::precise::exp(score - largest);
}

// Attends to rows start, start + stride, ... below end. In `kv` the keys begin at row `keys`, the values at row `values`. This
// lane holds row `lane_row` of those that its simdgroup reads at once, and the part `part` of that row.
template <typename T, int D, int DEPTH, int GROUP, int N, typename KV>
FUNCTION Attention<GROUP, N> attend_rows(Attention<GROUP, N> a, Queries<GROUP, N> queries, KV kv, uint keys, uint values,
                                         uint start, uint stride, uint end, uint lane_row, uint part, float scale) {
  constexpr int LANES = D / N;
  for (; start < end; start += stride * uint(DEPTH)) {
    Pack<N> key[DEPTH];
    Pack<N> value[DEPTH];
    UNROLL
    for (int d = 0; d < DEPTH; ++d) {
      const uint row = start + uint(d) * stride + lane_row;
      const uint read = row < end ? row : end - 1u;  // beyond the last row the weight is 0
      key[d] = load_aligned<N>(kv, (keys + read) * uint(D) + part * uint(N));
      value[d] = load_aligned<N>(kv, (values + read) * uint(D) + part * uint(N));
    }
    UNROLL
    for (int g = 0; g < GROUP; ++g) {
      float score[DEPTH];
      float largest = a.largest[g];
      UNROLL
      for (int d = 0; d < DEPTH; ++d) {
        float dot = 0.0f;
        UNROLL
        for (int k = 0; k < N; ++k) {
          dot = metal::fma(queries.v[g].v[k], key[d].v[k], dot);
        }
        UNROLL
        for (int step = LANES / 2; step > 0; step /= 2) {
          dot += metal::simd_shuffle_xor(dot, ushort(step));
        }
        score[d] = start + uint(d) * stride + lane_row < end ? dot * scale : -INFINITY;
        largest = metal::max(largest, score[d]);
      }
      const float shrunk = weight_of(a.largest[g], largest);
      a.largest[g] = largest;
      a.total[g] *= shrunk;
      UNROLL
      for (int k = 0; k < N; ++k) {
        a.sum[g].v[k] *= shrunk;
      }
      UNROLL
      for (int d = 0; d < DEPTH; ++d) {
        const float weight = weight_of(score[d], largest);
        a.total[g] += weight;
        UNROLL
        for (int k = 0; k < N; ++k) {
          a.sum[g].v[k] = metal::fma(weight, value[d].v[k], a.sum[g].v[k]);
        }
      }
    }
  }
  return a;
}

// The first token that a query sees, of those before `end`: from `first` on, and WINDOW of them or, where it is 0, all.
template <int WINDOW>
FUNCTION uint first_seen(uint first, uint end) {
  return metal::max(first, WINDOW > 0 && end > uint(WINDOW) ? end - uint(WINDOW) : 0u);
}

// Attends with query heads query to query + GROUP - 1, as simdgroup `worker` of `workers`: to its share of kv's rows, then of
// recent_kv's. `head` is the head of the keys among those of all batch rows; kv has `room` rows a head, recent_kv `recent_room`.
// `position` is the token's, `filled` the number of tokens before recent_kv, and `first` the first token that counts.
template <typename T, int KV, int GROUP, int D, int WINDOW, int DEPTH, typename Q, typename Cache>
FUNCTION Attention<GROUP, 16 / sizeof(T)> attend(Q q, uint query, Cache kv, uint room, Cache recent_kv, uint recent_room,
                                                 uint position, uint filled, uint first, uint head, uint worker, uint workers,
                                                 uint lane, float scale) {
  constexpr int N = 16 / sizeof(T);
  constexpr int LANES = D / N;
  constexpr uint ROWS = uint(SIMD_WIDTH / LANES);  // that a simdgroup reads at once
  const uint part = lane % uint(LANES);
  Queries<GROUP, N> queries;
  Attention<GROUP, N> a;
  UNROLL
  for (int g = 0; g < GROUP; ++g) {
    queries.v[g] = load<N>(q, (query + uint(g)) * uint(D) + part * uint(N));
    a.largest[g] = -INFINITY;
    a.total[g] = 0.0f;
    UNROLL
    for (int k = 0; k < N; ++k) {
      a.sum[g].v[k] = 0.0f;
    }
  }
  const uint end = position + 1u;
  const uint begin = first_seen<WINDOW>(first, end);
  const uint stride = workers * ROWS;
  a = attend_rows<T, D, DEPTH>(a, queries, kv, head * room, (uint(KV) + head) * room, begin + worker * ROWS, stride, filled,
                               lane / uint(LANES), part, scale);
  // recent_kv's rows go to the last worker first: the first one has the most to do already.
  const uint skipped = begin > filled ? begin - filled : 0u;
  return attend_rows<T, D, 1>(a, queries, recent_kv, head * recent_room, (uint(KV) + head) * recent_room,
                              skipped + (workers - 1u - worker) * ROWS, stride, end - filled, lane / uint(LANES), part, scale);
}

// Merges what all simdgroups of a threadgroup have for query head g, for thread `id` < D. `parts` has room for SIMDS D floats,
// `largest` and `totals` for SIMDS. Begins and ends with a barrier.
template <int D, int SIMDS, int GROUP, int N, typename Floats>
FUNCTION Merged merged(Attention<GROUP, N> a, int g, Floats parts, Floats largest, Floats totals, uint id, uint lane, uint simd) {
  constexpr uint LANES = uint(D / N);
  float most = a.largest[g];
  UNROLL
  for (uint step = LANES; step < uint(SIMD_WIDTH); step *= 2u) {
    most = metal::max(most, metal::simd_shuffle_xor(most, ushort(step)));
  }
  const float factor = weight_of(a.largest[g], most);
  float total = a.total[g] * factor;
  Pack<N> sum = a.sum[g];
  UNROLL
  for (int k = 0; k < N; ++k) {
    sum.v[k] *= factor;
  }
  UNROLL
  for (uint step = LANES; step < uint(SIMD_WIDTH); step *= 2u) {
    total += metal::simd_shuffle_xor(total, ushort(step));
    UNROLL
    for (int k = 0; k < N; ++k) {
      sum.v[k] += metal::simd_shuffle_xor(sum.v[k], ushort(step));
    }
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  if (lane < LANES) {
    store<float>(parts, simd * uint(D) + lane * uint(N), sum);
  }
  if (lane == 0u) {
    largest[simd] = most;
    totals[simd] = total;
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  const uint other = lane < uint(SIMDS) ? lane : 0u;
  Merged all;
  all.largest = metal::simd_max(largest[other]);
  const float share = weight_of(largest[other], all.largest);
  all.total = metal::simd_sum(lane < uint(SIMDS) ? share * totals[other] : 0.0f);
  all.sum = 0.0f;
  for (int s = 0; s < SIMDS; ++s) {
    const float weight = metal::simd_shuffle(share, ushort(s));
    all.sum = metal::fma(weight, parts[uint(s) * uint(D) + (id < uint(D) ? id : 0u)], all.sum);
  }
  return all;
}

// Where q, k and v go once they are multiplied, for matvec_qkv.metal.

// Copies recent_kv (2 KV, SLOTS, 2 HALF) to new_recent_kv, except for slot `slot`: thread `id` of `count` threads.
template <typename T, int KV, int HALF, int SLOTS, typename From, typename To>
FUNCTION void copy_recent_kv(From recent_kv, To new_recent_kv, uint slot, uint id, uint count) {
  constexpr int N = 2 * HALF * sizeof(T) % 16 == 0 ? 16 / sizeof(T) : 1;
  for (uint i = id * uint(N); i < uint(4 * KV * SLOTS * HALF); i += count * uint(N)) {
    if (i / uint(2 * HALF) % uint(SLOTS) != slot) {
      store<T>(new_recent_kv, i, load<N>(recent_kv, i));
    }
  }
}

// Two elements of a head that lie HALF apart, their biases, and the cosine and sine of their angle. A thread without a pair
// (mine is false) holds the first one.
struct HeadPair {
  bool mine;
  uint head, i;
  float low_bias, high_bias;
  float cosine, sine;
};

// bias (heads 2 HALF), table (HALF, 2).
template <int HALF, typename Bias, typename Table>
FUNCTION HeadPair load_pair(bool mine, uint pair, Bias bias, Table table) {
  HeadPair p;
  p.mine = mine;
  p.head = mine ? pair / uint(HALF) : 0u;
  p.i = mine ? pair % uint(HALF) : 0u;
  const uint at = p.head * uint(2 * HALF) + p.i;
  const Pack<2> rotation = load_aligned<2>(table, 2u * p.i);
  p.low_bias = float(bias[at]);
  p.high_bias = float(bias[at + uint(HALF)]);
  p.cosine = rotation.v[0];
  p.sine = rotation.v[1];
  return p;
}

// Adds the biases to both products, rotates q and k, and stores q in q (HEADS, 2 HALF), k and v in slot `slot` of new_recent_kv.
template <typename T, int HEADS, int KV, int HALF, int SLOTS, typename Q, typename KVs>
FUNCTION void store_pair(HeadPair p, metal::float2 products, Q q, KVs new_recent_kv, uint slot) {
  float a = float(T(float(T(products.x)) + p.low_bias));
  float b = float(T(float(T(products.y)) + p.high_bias));
  if (p.head < uint(HEADS + KV)) {
    const float first_half = rotated(a, b, p.cosine, p.sine);
    b = rotated(b, -a, p.cosine, p.sine);
    a = first_half;
  }
  if (p.mine && p.head < uint(HEADS)) {
    const uint at = p.head * uint(2 * HALF) + p.i;
    q[at] = T(a);
    q[at + uint(HALF)] = T(b);
  } else if (p.mine && slot < uint(SLOTS)) {
    const uint at = ((p.head - uint(HEADS)) * uint(SLOTS) + slot) * uint(2 * HALF) + p.i;
    new_recent_kv[at] = T(a);
    new_recent_kv[at + uint(HALF)] = T(b);
  }
}

// The vocabulary of the kernels in Metal; cuda_prelude.h says the same in CUDA.
#define FUNCTION inline
#define SIMD_WIDTH 32

// N neighbouring elements, widened to float.
template <int N>
struct Pack {
  float v[N];
};

// Templated on the pointer: MLX puts inputs of fewer than 8 elements into the constant address space.
template <int N, typename Pointer>
FUNCTION Pack<N> load(Pointer from, uint index) {
  Pack<N> pack;
  for (int k = 0; k < N; ++k) {
    pack.v[k] = float(from[index + uint(k)]);
  }
  return pack;
}

// Rounds each element to T, to nearest even.
template <typename T, int N, typename Pointer>
FUNCTION void store(Pointer to, uint index, Pack<N> pack) {
  for (int k = 0; k < N; ++k) {
    to[index + uint(k)] = T(pack.v[k]);
  }
}

FUNCTION float float_of_bits(int bits) {
  return as_type<float>(bits);
}

// The vocabulary of the kernels in Metal; cuda_prelude.h says the same in CUDA.
#define FUNCTION inline
#define SIMD_WIDTH 32
#define UNROLL _Pragma("clang loop unroll(full)")

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

// The same where `from` and index are known to lie at multiples of 16 bytes.
template <int N, bool ALIGNED, typename Pointer>
FUNCTION Pack<N> load_aligned(Pointer from, uint index) {
  return load<N>(from, index);
}

template <typename Pointer>
FUNCTION bool is_aligned(Pointer) {
  return true;
}

// N neighbouring 32-bit words.
template <int N>
struct Words {
  uint v[N];
};

template <int N, bool ALIGNED, typename Pointer>
FUNCTION Words<N> load_words(Pointer from, uint index) {
  Words<N> words;
  for (int k = 0; k < N; ++k) {
    words.v[k] = from[index + uint(k)];
  }
  return words;
}

// Each element rounded to T, to nearest even.
template <typename T, int N>
FUNCTION Pack<N> rounded(Pack<N> pack) {
  for (int k = 0; k < N; ++k) {
    pack.v[k] = float(T(pack.v[k]));
  }
  return pack;
}

// x[i] + y[j], ..., N sums, each rounded to T; x and y lie at multiples of 16 bytes if ALIGNED.
template <typename T, int N, bool ALIGNED, typename X, typename Y>
FUNCTION Pack<N> rounded_sum(X x, uint i, Y y, uint j) {
  Pack<N> sums = load<N>(x, i);
  const Pack<N> others = load<N>(y, j);
  for (int k = 0; k < N; ++k) {
    sums.v[k] += others.v[k];
  }
  return rounded<T>(sums);
}

// Rounds as well.
template <typename T, int N, typename Pointer>
FUNCTION void store(Pointer to, uint index, Pack<N> pack) {
  for (int k = 0; k < N; ++k) {
    to[index + uint(k)] = T(pack.v[k]);
  }
}

// The same where `to` and index are known to lie at multiples of 16 bytes if N elements are 16 bytes.
template <typename T, int N, typename Pointer>
FUNCTION void store_aligned(Pointer to, uint index, Pack<N> pack) {
  store<T>(to, index, pack);
}

template <typename T>
struct IsBfloat {
  enum { value = 0 };
};
template <>
struct IsBfloat<bfloat16_t> {
  enum { value = 1 };
};

// 2 N elements of 16 bits, as they are.
template <int N, bool ALIGNED, typename Pointer>
FUNCTION Words<N> load_halves(Pointer from, uint index) {
  Words<N> words;
  for (int k = 0; k < N; ++k) {
    words.v[k] = uint(as_type<ushort>(from[index + uint(2 * k)])) | (uint(as_type<ushort>(from[index + uint(2 * k + 1)])) << 16);
  }
  return words;
}

FUNCTION uint word_bits(uint x) {
  return x;
}
FUNCTION uint word_bits(float x) {
  return as_type<uint>(x);
}
FUNCTION uint word_bits(half x) {
  return uint(as_type<ushort>(x));
}
FUNCTION uint word_bits(bfloat16_t x) {
  return uint(as_type<ushort>(x));
}

// Starts to copy N elements of 2 or 4 bytes to word `at` of threadgroup memory, where 4 bytes or more lie at multiples of
// their size if ALIGNED. They are there for this thread after end_batch and wait_for_batches, for its simdgroup after a
// barrier.
template <int N, bool ALIGNED, typename Ring, typename Pointer>
FUNCTION void start_copy(Ring ring, uint at, Pointer from, uint index) {
  constexpr int PER = int(4 / sizeof(from[0]));
  for (int i = 0; i < N; i += PER) {
    uint word = 0u;
    for (int k = 0; k < PER && i + k < N; ++k) {
      word |= word_bits(from[index + uint(i + k)]) << uint(16 * k);
    }
    ring[at + uint(i / PER)] = word;
  }
}

// Element k of those from word `at` on; the first of a word before the second.
template <typename Ring, typename Pointer>
FUNCTION void put_element(Ring ring, uint at, uint k, Pointer from, uint index) {
  const uint bits = word_bits(from[index]);
  if (sizeof(from[0]) == 4) {
    ring[at + k] = bits;
  } else {
    ring[at + k / 2u] = k % 2u == 0u ? bits : ring[at + k / 2u] | (bits << 16);
  }
}

FUNCTION void end_batch() {}

// Until no more than the N newest batches are under way.
template <int N>
FUNCTION void wait_for_batches() {}

// The lower halves of two words, or their upper halves.
FUNCTION uint lower_halves(uint a, uint b) {
  return (a & 0xffffu) | (b << 16);
}
FUNCTION uint upper_halves(uint a, uint b) {
  return (a >> 16) | (b & 0xffff0000u);
}

// The number in the lower or the upper half of a word.
template <typename T>
FUNCTION float float_of(uint word, bool upper) {
  return float(as_type<T>(ushort(upper ? word >> 16 : word & 0xffffu)));
}

// Element i of the Ts from word `at` on.
template <typename T>
struct Number {
  template <typename Ring>
  static FUNCTION float at(Ring ring, uint from, uint i) {
    return float_of<T>(ring[from + i / 2u], i % 2u == 1u);
  }
};
template <>
struct Number<float> {
  template <typename Ring>
  static FUNCTION float at(Ring ring, uint from, uint i) {
    return as_type<float>(ring[from + i]);
  }
};

// sum + rows times columns for tiles of 16-bit numbers; see tiles.h for who holds what. The meaning of NVIDIA's
// instruction, written for the emulator: on Apple's GPUs rows.h's way is chosen.
template <typename T>
FUNCTION Pack<4> tile_product(Pack<4> sum, Words<4> rows, Words<2> columns, uint lane) {
  for (uint t = 0u; t < 4u; ++t) {
    for (int half_k = 0; half_k < 2; ++half_k) {
      const uint a = metal::simd_shuffle(rows.v[half_k * 2], ushort(lane / 4u * 4u + t));
      const uint b = metal::simd_shuffle(rows.v[half_k * 2 + 1], ushort(lane / 4u * 4u + t));
      const uint x = metal::simd_shuffle(columns.v[half_k], ushort(lane % 4u * 8u + t));
      const uint y = metal::simd_shuffle(columns.v[half_k], ushort(lane % 4u * 8u + 4u + t));
      for (int upper = 0; upper < 2; ++upper) {
        const float first = float_of<T>(a, upper == 1);
        const float second = float_of<T>(b, upper == 1);
        sum.v[0] = metal::fma(first, float_of<T>(x, upper == 1), sum.v[0]);
        sum.v[1] = metal::fma(first, float_of<T>(y, upper == 1), sum.v[1]);
        sum.v[2] = metal::fma(second, float_of<T>(x, upper == 1), sum.v[2]);
        sum.v[3] = metal::fma(second, float_of<T>(y, upper == 1), sum.v[3]);
      }
    }
  }
  return sum;
}

// (word & mask) | bits
FUNCTION uint masked_or(uint word, uint mask, uint bits) {
  return (word & mask) | bits;
}

FUNCTION float float_of_bits(int bits) {
  return as_type<float>(bits);
}

FUNCTION uint bits_of_float(float value) {
  return as_type<uint>(value);
}

// The float16 in the lower 16 bits.
FUNCTION float float_of_half(uint bits) {
  return float(as_type<half>(ushort(bits & 0xffffu)));
}

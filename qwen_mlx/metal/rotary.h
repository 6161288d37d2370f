// Cosine and sine of a position's angle, exact to about 2^-48, each as a sum of two floats: float32 arithmetic on the
// angle itself would be wrong by 0.03 radians at position 1,000,000.
struct alignas(16) Rotation {
  float cos_high, cos_low, sin_high, sin_low;
};

// The same to 2^-33 for elements of 16 bits: the high parts have 12 bits, so that a product of both is exact in float32,
// and the low parts their sign, so that an infinite element stays one.
struct alignas(16) ShortRotation {
  float cos_high, cos_low, sin_high, sin_low;
};

// What elements of so many bytes are turned by.
template <int BYTES>
struct RotationOf {
  typedef Rotation type;
};
template <>
struct RotationOf<2> {
  typedef ShortRotation type;
};

// The upper 64 bits of a * b, at most 3 too small.
FUNCTION ulong multiply_high(ulong a, ulong b) {
  const ulong a_high = a >> 32;
  const ulong b_high = b >> 32;
  const ulong a_low = a & 0xfffffffful;
  const ulong b_low = b & 0xfffffffful;
  return a_high * b_high + ((a_high * b_low) >> 32) + ((a_low * b_high) >> 32);
}

// high, middle and low: the turns a position makes in units of 2^-96, 32 bits each. Products wrap at whole turns, so
// the range reduction is exact for every int32 position. scale + scale_low multiplies both (YaRN's attention factor).
FUNCTION Rotation rotation(Rotation, uint high, uint middle, uint low, int position, float scale, float scale_low) {
  const ulong turns = (ulong(high) << 32) | ulong(middle);
  const ulong phase = turns * ulong(long(position)) + ulong((long(low) * long(position)) >> 32);
  // Eighths of a turn; the fraction of one, counted from its even end, in units of 2^-64, and its square.
  const uint octant = uint(phase >> 61);
  const ulong fraction = phase << 3;
  const bool backwards = (octant & 1u) == 1u;
  const ulong x = backwards ? ~fraction : fraction;
  const ulong y = multiply_high(x, x);
  // Taylor's series of cos(x pi / 4) and sin(x pi / 4), coefficients and sums in units of 2^-62.
  ulong c = 0x00000000001b6e25ul;
  c = 0x000000001f9d38a3ul - multiply_high(c, y);
  c = 0x0000001a6d1f2a20ul - multiply_high(c, y);
  c = 0x00000f0fa83448ddul - multiply_high(c, y);
  c = 0x0005574f1f8f2ffeul - multiply_high(c, y);
  c = 0x0103c1f081b5ac3bul - multiply_high(c, y);
  c = 0x13bd3cc9be45de5aul - multiply_high(c, y);
  c = 0x4000000000000000ul - multiply_high(c, y);
  ulong s = 0x0000000000016faeul;
  s = 0x0000000001e8f435ul - multiply_high(s, y);
  s = 0x00000001e3074fdful - multiply_high(s, y);
  s = 0x00000150783487eeul - multiply_high(s, y);
  s = 0x00009969667315ecul - multiply_high(s, y);
  s = 0x0028cd78ceeb55c4ul - multiply_high(s, y);
  s = 0x052aef39896f94b0ul - multiply_high(s, y);
  s = 0x3243f6a8885a308dul - multiply_high(s, y);
  s = multiply_high(s, x);
  // Octants 1, 2, 5 and 6 swap the two; cosine is negative in 2 to 5, sine in 4 to 7.
  const bool swapped = ((octant + 1u) & 2u) == 2u;
  long cosine = long(swapped ? s : c);
  long sine = long(swapped ? c : s);
  cosine = (octant >= 2u && octant < 6u) ? -cosine : cosine;
  sine = octant >= 4u ? -sine : sine;

  const float unit = 2.16840434e-19f;  // 2^-62
  const float c_high = float(cosine) * unit;
  const float s_high = float(sine) * unit;
  const float c_low = float(cosine - long(float(cosine))) * unit;
  const float s_low = float(sine - long(float(sine))) * unit;
  Rotation r;
  r.cos_high = c_high * scale;
  r.sin_high = s_high * scale;
  r.cos_low = metal::fma(c_high, scale, -r.cos_high) + metal::fma(c_low, scale, c_high * scale_low);
  r.sin_low = metal::fma(s_high, scale, -r.sin_high) + metal::fma(s_low, scale, s_high * scale_low);
  return r;
}

// A number as a sum of two floats.
struct Two {
  float high, low;
};

// a + b, where a is the larger (Dekker 1971).
FUNCTION Two sum_of(float a, float b) {
  Two r;
  r.high = a + b;
  r.low = b - (r.high - a);
  return r;
}

FUNCTION Two sum_of(Two a, Two b) {
  Two r = sum_of(a.high, b.high);
  r.low += a.low + b.low;
  return r;
}

FUNCTION Two product_of(Two a, Two b) {
  Two r;
  r.high = a.high * b.high;
  r.low = metal::fma(a.high, b.high, -r.high) + metal::fma(a.high, b.low, a.low * b.high);
  return r;
}

FUNCTION Two two(float high, float low) {
  Two r;
  r.high = high;
  r.low = low;
  return r;
}

// The high part a little nearer to zero, with 12 bits: what is left then has its sign.
FUNCTION Two cut(Two a) {
  const float high = float_of_bits(int(bits_of_float(a.high * 0.99987793f) & 0xfffff000u));
  return two(high, (a.high - high) + a.low);
}

// As above, by sums of two floats: a fraction of the instructions.
FUNCTION ShortRotation rotation(ShortRotation, uint high, uint middle, uint low, int position, float scale,
                                float scale_low) {
  const ulong turns = (ulong(high) << 32) | ulong(middle);
  const ulong exact = turns * ulong(long(position)) + ulong((long(low) * long(position)) >> 32);
  // Quarters of a turn, counted from an eighth before each; x, from a quarter's middle, in eighths: -1 to 1.
  const ulong phase = exact + 0x2000000000000000ul;
  const uint quarter = uint(phase >> 62);
  const uint top = uint(phase >> 30) ^ 0x80000000u;
  const Two x = two(float(int(top & 0xffffff80u)) * 4.65661287e-10f, float(uint((phase << 2) >> 7)) * 1.38777878e-17f);
  const Two y = product_of(x, x);
  // Taylor's series of cos(x pi / 4) and sin(x pi / 4); what weighs less than 2^-24 of the sum in one float.
  float rest = metal::fma(1.15011591e-10f, y.high, -2.46113689e-8f);
  rest = metal::fma(rest, y.high, 3.59086039e-6f);
  rest = metal::fma(rest, y.high, -3.25991889e-4f);
  Two c = sum_of(0.0158543438f, metal::fma(rest, y.high, 4.71880979e-10f));
  c = sum_of(two(-0.308425128f, -9.07411213e-9f), product_of(c, y));
  c = sum_of(two(1.0f, 0.0f), product_of(c, y));
  rest = metal::fma(6.9484531e-12f, y.high, -1.75724768e-9f);
  rest = metal::fma(rest, y.high, 3.13361681e-7f);
  rest = metal::fma(rest, y.high, -3.65762025e-5f);
  Two s = sum_of(2.49039452e-3f, metal::fma(rest, y.high, 5.4276014e-11f));
  s = sum_of(two(-0.0807455108f, -1.43131129e-9f), product_of(s, y));
  s = sum_of(two(0.785398185f, -2.18556941e-8f), product_of(s, y));
  s = product_of(s, x);
  s = sum_of(s.high, s.low);
  // Quarters 1 and 3 swap the two; cosine is negative in 1 and 2, sine in 2 and 3.
  const bool swapped = (quarter & 1u) == 1u;
  const float cos_sign = quarter == 1u || quarter == 2u ? -1.0f : 1.0f;
  const float sin_sign = quarter >= 2u ? -1.0f : 1.0f;
  const Two cosine = cut(product_of(swapped ? s : c, two(cos_sign * scale, cos_sign * scale_low)));
  const Two sine = cut(product_of(swapped ? c : s, two(sin_sign * scale, sin_sign * scale_low)));
  ShortRotation r;
  r.cos_high = cosine.high;
  r.cos_low = cosine.low;
  r.sin_high = sine.high;
  r.sin_low = sine.low;
  return r;
}

// a (c + c_low) - b (s + s_low), to 2 ulp however much cancels (Kahan's difference of products, Jeannerod et al. 2013).
FUNCTION float difference(float a, float c, float c_low, float b, float s, float s_low) {
  const float product = b * s;
  const float lost = metal::fma(b, s, -product);
  const float y = metal::fma(a, c, -product);
  const float more = metal::fma(a, c_low, -(b * s_low));
  return metal::isfinite(y) ? y + (more - lost) : y;
}

// Element a of a pair turned, whose other is b; the other is turned(b, -a, r).
FUNCTION float turned(float a, float b, Rotation r) {
  return difference(a, r.cos_high, r.cos_low, b, r.sin_high, r.sin_low);
}

FUNCTION float turned(float a, float b, ShortRotation r) {
  const float sum = metal::fma(a, r.cos_high, -(b * r.sin_high));
  return metal::fma(-b, r.sin_low, metal::fma(a, r.cos_low, sum));
}

// Where angle i of each HALF lies in a table: neighbouring threads, N angles apart, read neighbouring entries,
// which keeps them in different banks of threadgroup memory.
template <int N, int HALF>
FUNCTION uint slot(uint i) {
  const uint j = i % uint(HALF);
  return i - j + j % uint(N) * uint(HALF / N) + j / uint(N);
}

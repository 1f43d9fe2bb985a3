// One ConvMixer block's training step, but for its matrix products, in few passes over memory (training/fused.py).
//
// Feature maps are channels_last: [images, height, width, channels], in float32 or bf16; all arithmetic is float32.
// Compiled for one kernel size, KERNEL, and one width of vectors, LANES. Every sum is made per image, in a fixed order, by one thread, so results do not
// depend on who was faster.

#include <algorithm>
#include <vector>

#include "vector.h"

namespace {

constexpr int BLOCK = 16;    // channels whose padded image stays in the first-level cache; 16 floats are a cache line
constexpr int TILE = LANES;  // outputs of a row computed together: as many as there are registers for, in AVX2 and in AVX-512
constexpr int PAD = KERNEL / 2;

struct alignas(4 * BLOCK) Line {  // else most loads would cross into the next cache line
    float channels[BLOCK];
};

struct Shape {
    int images, height, width, channels, threads;
    long positions() const { return long(height) * width; }
};

// What batch normalisation's backward pass needs of a channel: dx = a · dy + b · (x - mean) + c.
struct Coefficients {
    const float *mean, *a, *b, *c;
    Coefficients(const float* rows, int channels) : mean(rows), a(mean + channels), b(a + channels), c(b + channels) {}
};

// Gradient before GELU and batch normalisation, from the gradient behind them.
template <typename T>
inline vec gradient_before(vec z, vec dy, const Coefficients& k, int channel) {
    const Gelu at = gelu_and_slope<T>(z);
    const vec centred = at.value - load(k.mean + channel);
    const vec da = dy * load(k.a + channel) + centred * load(k.b + channel) + load(k.c + channel);
    return da * at.slope;
}

// Depthwise convolution of `width` neighbouring positions of one vector of channels; `sums` holds what is added to.
// Every input is loaded once for all the sums that it is part of.
template <int WIDTH = TILE>
inline void convolve(int width, const float* padded, int row_length, const float* weight, vec* sums) {
    if constexpr (WIDTH > 1)
        if (width < WIDTH) return convolve<WIDTH - 1>(width, padded, row_length, weight, sums);
    vec local[WIDTH];
    for (int t = 0; t < WIDTH; ++t) local[t] = sums[t];
    for (int i = 0; i < KERNEL; ++i) {
        vec taps[KERNEL];
#pragma GCC unroll 16
        for (int j = 0; j < KERNEL; ++j) taps[j] = load(weight + (i * KERNEL + j) * BLOCK);
#pragma GCC unroll 32
        for (int p = 0; p < WIDTH + KERNEL - 1; ++p) {
            const vec input = load(padded + i * row_length + p * BLOCK);
#pragma GCC unroll 16
            for (int j = 0; j < KERNEL; ++j)
                if (p - j >= 0 && p - j < WIDTH) local[p - j] += input * taps[j];
        }
    }
    for (int t = 0; t < WIDTH; ++t) sums[t] = local[t];
}

// A row is cut into tiles as equal as can be: 24 positions are 12 + 12, because 16 + 8 take longer.
template <typename Body>
inline void for_tiles(int width, Body body) {
    const int tiles = (width + TILE - 1) / TILE;
    for (int tile = 0; tile < tiles; ++tile) {
        const int begin = width * tile / tiles;
        body(begin, width * (tile + 1) / tiles - begin);
    }
}

// Calls body(image, first channel, channels, padded image, weights) for every image and block of channels.
template <typename Body>
void for_blocks(const Shape& s, Body body) {
    const int blocks = (s.channels + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads(s.threads)
    {
        std::vector<Line> padded(long(s.height + 2 * PAD) * (s.width + 2 * PAD));
        std::vector<Line> weights(KERNEL * KERNEL);
#pragma omp for schedule(static)
        for (long task = 0; task < long(s.images) * blocks; ++task) {
            const int first = task % blocks * BLOCK;
            body(task / blocks, first, std::min(BLOCK, s.channels - first), padded[0].channels, weights[0].channels);
        }
    }
}

template <typename T>
void depthwise_forward(Shape s, const T* x, const float* weight, const float* bias, T* z, float* statistics) {
    const int C = s.channels, row = (s.width + 2 * PAD) * BLOCK;
    const long plane = long(s.images) * C;
    for_blocks(s, [&](long image, int first, int count, float* padded, float* weights) {
        const long offset = image * s.positions() * C + first;
        for (int tap = 0; tap < KERNEL * KERNEL; ++tap) std::copy_n(weight + long(tap) * C + first, count, weights + tap * BLOCK);
        for (int y = 0; y < s.height; ++y)
            for (int p = 0; p < s.width; ++p)
                for (int c = 0; c < count; c += LANES)
                    store(padded + (y + PAD) * row + (p + PAD) * BLOCK + c, load(x + offset + (long(y) * s.width + p) * C + c));
        for (int c = 0; c < count; c += LANES) {
            vec pivot{}, sum{}, square{};
            for (int y = 0; y < s.height; ++y)
                for_tiles(s.width, [&](int begin, int width) {
                    vec sums[TILE];
                    for (int t = 0; t < width; ++t) sums[t] = load(bias + first + c);
                    convolve(width, padded + y * row + begin * BLOCK + c, row, weights + c, sums);
                    for (int t = 0; t < width; ++t) {
                        store(z + offset + (long(y) * s.width + begin + t) * C + c, sums[t]);
                        const vec a = gelu<T>(sums[t]);
                        if (y == 0 && begin + t == 0) pivot = a;
                        sum += a - pivot;
                        square += (a - pivot) * (a - pivot);
                    }
                });
            float* out = statistics + image * C + first + c;
            store(out, pivot);
            store(out + plane, sum);
            store(out + 2 * plane, square);
        }
    });
}

template <typename T>
void depthwise_backward(Shape s, const T* dy, const T* z, const T* x, const float* rows, const float* weight, T* dx,
                        float* dweight, float* dbias) {
    const int C = s.channels, row = (s.width + 2 * PAD) * BLOCK;
    const Coefficients k(rows, C);
    for_blocks(s, [&](long image, int first, int count, float* padded, float* weights) {
        const long offset = image * s.positions() * C + first;
        for (int tap = 0; tap < KERNEL * KERNEL; ++tap)  // the input's gradient is a convolution with the kernel turned by 180°
            std::copy_n(weight + long(KERNEL * KERNEL - 1 - tap) * C + first, count, weights + tap * BLOCK);
        for (int c = 0; c < count; c += LANES) {
            vec sum{};
            for (int y = 0; y < s.height; ++y)
                for (int p = 0; p < s.width; ++p) {
                    const long at = offset + (long(y) * s.width + p) * C + c;
                    for (const T* next : {dy, z, x}) __builtin_prefetch(next + at + BLOCK);  // its lines are far apart
                    const vec dz = gradient_before<T>(load(z + at), load(dy + at), k, first + c);
                    store(padded + (y + PAD) * row + (p + PAD) * BLOCK + c, dz);
                    sum += dz;
                }
            store(dbias + image * C + first + c, sum);

            vec taps[KERNEL * KERNEL] = {};
            for (int y = 0; y < s.height; ++y) {
                const T* x_row = x + offset + long(y) * s.width * C + c;
                for (int i = 0; i < KERNEL; ++i) {
                    const float* p = padded + (y + KERNEL - 1 - i) * row + (KERNEL - 1) * BLOCK + c;
                    vec even[KERNEL], odd[KERNEL] = {};  // two chains of sums, for their latency
                    for (int j = 0; j < KERNEL; ++j) even[j] = taps[i * KERNEL + j];
                    int q = 0;
                    for (; q + 1 < s.width; q += 2) {
                        const vec left = load(x_row + long(q) * C), right = load(x_row + long(q + 1) * C);
#pragma GCC unroll 16
                        for (int j = 0; j < KERNEL; ++j) {
                            even[j] += left * load(p + (q - j) * BLOCK);
                            odd[j] += right * load(p + (q + 1 - j) * BLOCK);
                        }
                    }
                    if (q < s.width)
                        for (int j = 0; j < KERNEL; ++j) even[j] += load(x_row + long(q) * C) * load(p + (q - j) * BLOCK);
                    for (int j = 0; j < KERNEL; ++j) taps[i * KERNEL + j] = even[j] + odd[j];
                }
            }
            for (int tap = 0; tap < KERNEL * KERNEL; ++tap)
                store(dweight + (image * KERNEL * KERNEL + tap) * C + first + c, taps[tap]);

            for (int y = 0; y < s.height; ++y)
                for_tiles(s.width, [&](int begin, int width) {
                    const long at = offset + (long(y) * s.width + begin) * C + c;
                    vec sums[TILE];
                    for (int t = 0; t < width; ++t) sums[t] = load(dy + at + long(t) * C);  // past the convolution
                    convolve(width, padded + y * row + begin * BLOCK + c, row, weights + c, sums);
                    for (int t = 0; t < width; ++t) store(dx + at + long(t) * C, sums[t]);
                });
        }
    });
}

template <typename Body>
void for_images(const Shape& s, Body body) {
#pragma omp parallel for schedule(static) num_threads(s.threads)
    for (int image = 0; image < s.images; ++image) body(long(image));
}

template <typename T>
void gelu_statistics(Shape s, const T* z, float* statistics) {
    const int C = s.channels;
    const long plane = long(s.images) * C;
    for_images(s, [&](long image) {
        float *pivot = statistics + image * C, *sum = pivot + plane, *square = sum + plane;
        const T* p = z + image * s.positions() * C;
        for (int c = 0; c < C; c += LANES) {
            store(pivot + c, gelu<T>(load(p + c)));
            store(sum + c, vec{});
            store(square + c, vec{});
        }
        for (long position = 0; position < s.positions(); ++position, p += C)
            for (int c = 0; c < C; c += LANES) {
                const vec d = gelu<T>(load(p + c)) - load(pivot + c);
                add(sum + c, d);
                add(square + c, d * d);
            }
    });
}

template <typename T>
void gelu_scale_shift(Shape s, const T* z, const T* residual, const float* scale, T* y) {
    const int C = s.channels;
    const float* shift = scale + C;
    for_images(s, [&](long image) {
        for (long position = 0; position < s.positions(); ++position)
            for (int c = 0; c < C; c += LANES) {
                const long at = (image * s.positions() + position) * C + c;
                const vec out = gelu<T>(load(z + at)) * load(scale + c) + load(shift + c);
                store(y + at, residual ? load(residual + at) + out : out);
            }
    });
}

// Per image Σ dy and Σ dy · (gelu(z) - mean).
template <typename T>
void norm_gradients(Shape s, const T* dy, const T* z, const float* mean, float* sums) {
    const int C = s.channels;
    for_images(s, [&](long image) {
        float *dshift = sums + image * C, *dscale = dshift + long(s.images) * C;
        std::fill_n(dshift, C, 0.0f);
        std::fill_n(dscale, C, 0.0f);
        for (long position = 0; position < s.positions(); ++position)
            for (int c = 0; c < C; c += LANES) {
                const long at = (image * s.positions() + position) * C + c;
                const vec d = load(dy + at);
                add(dshift + c, d);
                add(dscale + c, d * (gelu<T>(load(z + at)) - load(mean + c)));
            }
    });
}

template <typename T>
void gelu_norm_backward(Shape s, const T* dy, const T* z, const float* rows, T* dz, float* dbias) {
    const int C = s.channels;
    const Coefficients k(rows, C);
    for_images(s, [&](long image) {
        float* sum = dbias + image * C;
        std::fill_n(sum, C, 0.0f);
        for (long position = 0; position < s.positions(); ++position)
            for (int c = 0; c < C; c += LANES) {
                const long at = (image * s.positions() + position) * C + c;
                const vec d = gradient_before<T>(load(z + at), load(dy + at), k, c);
                store(dz + at, d);
                add(sum + c, d);
            }
    });
}

}  // namespace

#define EXPORT(T, SUFFIX)                                                                                                   \
    extern "C" void depthwise_forward_##SUFFIX(Shape s, const T* x, const float* w, const float* b, T* z, float* sums) {    \
        depthwise_forward(s, x, w, b, z, sums);                                                                             \
    }                                                                                                                       \
    extern "C" void depthwise_backward_##SUFFIX(Shape s, const T* dy, const T* z, const T* x, const float* k,               \
                                                const float* w, T* dx, float* dw, float* db) {                              \
        depthwise_backward(s, dy, z, x, k, w, dx, dw, db);                                                                  \
    }                                                                                                                       \
    extern "C" void gelu_statistics_##SUFFIX(Shape s, const T* z, float* sums) { gelu_statistics(s, z, sums); }             \
    extern "C" void gelu_scale_shift_##SUFFIX(Shape s, const T* z, const T* residual, const float* k, T* y) {               \
        gelu_scale_shift(s, z, residual, k, y);                                                                             \
    }                                                                                                                       \
    extern "C" void norm_gradients_##SUFFIX(Shape s, const T* dy, const T* z, const float* mean, float* sums) {             \
        norm_gradients(s, dy, z, mean, sums);                                                                               \
    }                                                                                                                       \
    extern "C" void gelu_norm_backward_##SUFFIX(Shape s, const T* dy, const T* z, const float* k, T* dz, float* db) {       \
        gelu_norm_backward(s, dy, z, k, dz, db);                                                                            \
    }

EXPORT(float, float32)
EXPORT(bf16, bfloat16)

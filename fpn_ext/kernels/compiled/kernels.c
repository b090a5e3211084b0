/* What the pyramid spends its time on, compiled for this processor: fpn_ext/kernels/compiled builds
 * this file once with AVX2 (LANES 8) and once with AVX-512 (LANES 16). Multiply-adds are fused where
 * the code says so (`plus`), and nowhere else.
 *
 * Maps are channels_last: a pixel's channels lie side by side. They are float32; those that are
 * pooled may be bfloat16, which is the upper half of a float32. Vectors run along channels. Work is
 * divided among OpenMP's threads, those of torch itself.
 */
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t mask __attribute__((vector_size(4 * LANES)));
#define INLINE static inline __attribute__((always_inline))

/* A matrix product is computed ROWS x PANEL sums at a time, all in registers. */
enum { ROWS = LANES == 16 ? 12 : 6, PANEL = 2 * LANES };

int32_t lanes(void) { return LANES; }
int32_t rows_at_once(void) { return ROWS; }

#if LANES == 16
INLINE vec all(float x) { return (vec)_mm512_set1_ps(x); }
INLINE vec plus(vec x, vec y, vec sum) {
    return (vec)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)sum);
}
#else
INLINE vec all(float x) { return (vec)_mm256_set1_ps(x); }
INLINE vec plus(vec x, vec y, vec sum) {
    return (vec)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)sum);
}
#endif
INLINE vec at_least_zero(vec x) { return (vec)((mask)x & ~(x < (vec){0})); } /* NaN stays */

/* LANES channels from `i` on of a map, which is bfloat16 if `half`. */
INLINE vec read_map(const void *map, ptrdiff_t i, const int half) {
    if (!half) return *(const vec *)((const float *)map + i);
    const uint16_t *from = (const uint16_t *)map + i;
#if LANES == 16
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)from)), 16);
#else
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)from)), 16);
#endif
}

/* The same to a map; values that are bfloat16 already. */
INLINE void write_map(void *map, ptrdiff_t i, const int half, vec values) {
    if (!half) {
        *(vec *)((float *)map + i) = values;
        return;
    }
    uint16_t *to = (uint16_t *)map + i;
#if LANES == 16
    __m512i upper = _mm512_srli_epi32((__m512i)values, 16);
    _mm256_storeu_si256((void *)to, _mm512_cvtepi32_epi16(upper));
#else
    __m256i upper = _mm256_srli_epi32((__m256i)values, 16);
    __m128i low = _mm256_castsi256_si128(upper), high = _mm256_extracti128_si256(upper, 1);
    _mm_storeu_si128((void *)to, _mm_packus_epi32(low, high));
#endif
}

enum { AHEAD = 16 * PANEL };

/* sums[r][:] += sum over k of a[r * row + k * step] * panel[k][:] */
INLINE void multiply(const float *a, ptrdiff_t row, ptrdiff_t step, const float *panel,
                     ptrdiff_t depth, vec sums[ROWS][2]) {
    for (ptrdiff_t k = 0; k < depth; k++, a += step, panel += PANEL) {
        vec left = *(const vec *)panel, right = *(const vec *)(panel + LANES);
        __builtin_prefetch(panel + AHEAD);
        __builtin_prefetch(panel + AHEAD + 16);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++) {
            vec x = all(a[r * row]);
            sums[r][0] = plus(x, left, sums[r][0]);
            sums[r][1] = plus(x, right, sums[r][1]);
        }
    }
}

/* ---------------------------------------------------------------- 3x3 convolution, Winograd's */

/* F(4x4, 3x3) at the points 0, +-A, +-B and infinity (fpn_ext/kernels/winograd.py). */
#define A 0.625f
#define B 1.5f

/* B^T d along one axis. */
INLINE void transform_input(const vec d[6], vec v[6]) {
    const vec a2 = all(-A * A), b2 = all(-B * B), sum = all(-A * A - B * B), both = all(A * A * B * B);
    vec even_a = plus(b2, d[2], d[4]), odd_a = plus(b2, d[1], d[3]);
    vec even_b = plus(a2, d[2], d[4]), odd_b = plus(a2, d[1], d[3]);
    v[0] = plus(both, d[0], plus(sum, d[2], d[4]));
    v[1] = plus(all(A), odd_a, even_a);
    v[2] = plus(all(-A), odd_a, even_a);
    v[3] = plus(all(B), odd_b, even_b);
    v[4] = plus(all(-B), odd_b, even_b);
    v[5] = plus(both, d[1], plus(sum, d[3], d[5]));
}

/* A^T m along one axis. */
INLINE void transform_output(const vec m[6], vec y[4]) {
    vec even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
    y[0] = m[0] + even_a + even_b;
    y[1] = plus(all(A), odd_a, all(B) * odd_b);
    y[2] = plus(all(A * A), even_a, all(B * B) * even_b);
    y[3] = plus(all(A * A * A), odd_a, plus(all(B * B * B), odd_b, m[5]));
}

/* Filters of a convolution, in the order in which winograd() reads them. */
struct filters {
    const float *weight; /* weight[o * strides[0] + i * strides[1] + y * strides[2] + x * strides[3]] */
    float *result;       /* (outputs / PANEL rounded up, channels, 9, PANEL) */
    int64_t outputs, channels, strides[4];
    int32_t threads;
};

void pack_filters(const struct filters *f) {
    const int64_t panels = (f->outputs + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static) collapse(2) num_threads(f->threads)
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t i = 0; i < f->channels; i++) {
            float *to = f->result + (panel * f->channels + i) * 9 * PANEL;
            for (int tap = 0; tap < 9; tap++)
                for (int lane = 0; lane < PANEL; lane++) {
                    int64_t o = panel * PANEL + lane;
                    const float *from = f->weight + i * f->strides[1] + tap / 3 * f->strides[2] +
                                        tap % 3 * f->strides[3];
                    to[tap * PANEL + lane] = o < f->outputs ? from[o * f->strides[0]] : 0;
                }
        }
}

/* G g along one axis: the polynomial at each point, divided by the point's differences to the
 * others. */
INLINE void transform_filter(const vec g[3], vec u[6]) {
    const float a2 = A * A, b2 = B * B;
    const float at_a = 1 / (2 * a2 * (a2 - b2)), at_b = 1 / (2 * b2 * (b2 - a2));
    vec even_a = plus(all(a2), g[2], g[0]), even_b = plus(all(b2), g[2], g[0]);
    u[0] = all(1 / (a2 * b2)) * g[0];
    u[1] = all(at_a) * plus(all(A), g[1], even_a);
    u[2] = all(at_a) * plus(all(-A), g[1], even_a);
    u[3] = all(at_b) * plus(all(B), g[1], even_b);
    u[4] = all(at_b) * plus(all(-B), g[1], even_b);
    u[5] = g[2];
}

/* A panel's filters, G g G^T: (channels, 9, PANEL) -> 36 matrices of (channels, PANEL), `plane`
 * floats apart. */
static void transform_panel(const float *packed, int64_t channels, float *to, ptrdiff_t plane) {
    for (int64_t i = 0; i < 2 * channels; i++) { /* half a panel at a time */
        const float *from = packed + i / 2 * 9 * PANEL + i % 2 * LANES;
        vec half_done[6][3], u[6];
#pragma GCC unroll 3
        for (int x = 0; x < 3; x++) {
            vec g[3];
#pragma GCC unroll 3
            for (int y = 0; y < 3; y++) g[y] = *(const vec *)(from + (3 * y + x) * PANEL);
            transform_filter(g, u);
#pragma GCC unroll 6
            for (int y = 0; y < 6; y++) half_done[y][x] = u[y];
        }
#pragma GCC unroll 6
        for (int y = 0; y < 6; y++) {
            transform_filter(half_done[y], u);
#pragma GCC unroll 6
            for (int x = 0; x < 6; x++) *(vec *)(to + (6 * y + x) * plane + i * LANES) = u[x];
        }
    }
}

struct convolution {
    const float *maps;    /* (images, height, width, channels) */
    const float *filters; /* of pack_filters() */
    const float *bias;    /* (outputs,) or NULL */
    const float *zeros;   /* (channels,) */
    float *result;        /* (images, height, width, outputs) */
    float *shared;        /* winograd_shared() floats */
    float *scratch;       /* winograd_scratch() floats for each thread */
    int64_t images, height, width, channels, outputs, tiles_at_once;
    int32_t relu, threads;
};

/* A multiple of 4096 bytes between planes would have them compete for the same cache lines. */
enum { APART = 272 };

/* Tiles of 4x4 outputs, and where their 36 transformed values are. */
struct tiles {
    int64_t across, of_image, all, at_once; /* at_once: transformed and multiplied together */
    ptrdiff_t row, plane, product_plane, filter_plane;
    int64_t panels;
    int few;
};

static struct tiles tiles_of(const struct convolution *c) {
    struct tiles t;
    t.across = (c->width + 3) / 4, t.of_image = (c->height + 3) / 4 * t.across;
    t.all = c->images * t.of_image, t.panels = (c->outputs + PANEL - 1) / PANEL;
    /* Of few tiles, all are transformed first, and the threads divide the outputs. */
    t.few = t.all < 2 * c->threads * c->tiles_at_once && t.panels >= c->threads;
    t.at_once = t.few ? (t.all + ROWS - 1) / ROWS * ROWS : c->tiles_at_once;
    t.row = c->channels + LANES, t.plane = t.at_once * t.row + APART;
    t.product_plane = t.at_once * PANEL + APART, t.filter_plane = c->channels * PANEL + 16;
    return t;
}

int64_t winograd_shared(const struct convolution *c) {
    const struct tiles t = tiles_of(c);
    return 36 * (t.few ? t.plane : t.panels * t.filter_plane);
}

int64_t winograd_scratch(const struct convolution *c) {
    const struct tiles t = tiles_of(c);
    return 36 * (t.product_plane + (t.few ? t.filter_plane : t.plane));
}

static const int64_t ONE_BLOCK = INT64_C(1) << 62; /* a power of two: no division */

/* Maps of (images, height, width, channels), and zeros for what is outside them. */
struct maps {
    const float *values, *zeros;
    int64_t height, width, channels;
};

/* B^T d B of the 6x6 pixels from (top, left) on: value p of channel i to to[p * plane +
 * i / block * apart + i % block]. */
INLINE void input_tile(struct maps m, int64_t image, int64_t top, int64_t left, float *to,
                       ptrdiff_t plane, int64_t block, ptrdiff_t apart) {
    const float *pixels[6][6];
    for (int y = 0; y < 6; y++)
        for (int x = 0; x < 6; x++) {
            int64_t row = top + y, column = left + x;
            int inside = 0 <= row && row < m.height && 0 <= column && column < m.width;
            pixels[y][x] =
                inside ? m.values + ((image * m.height + row) * m.width + column) * m.channels
                       : m.zeros;
        }
    for (int64_t i = 0; i < m.channels; i += LANES) {
        float *here = to + i / block * apart + i % block;
        vec half[6][6];
#pragma GCC unroll 6
        for (int x = 0; x < 6; x++) {
            vec d[6], v[6];
#pragma GCC unroll 6
            for (int y = 0; y < 6; y++) d[y] = *(const vec *)(pixels[y][x] + i);
            transform_input(d, v);
#pragma GCC unroll 6
            for (int y = 0; y < 6; y++) half[y][x] = v[y];
        }
#pragma GCC unroll 6
        for (int y = 0; y < 6; y++) {
            vec v[6];
            transform_input(half[y], v);
#pragma GCC unroll 6
            for (int x = 0; x < 6; x++) *(vec *)(here + (6 * y + x) * plane) = v[x];
        }
    }
}

static void output_tile(const struct convolution *c, int64_t image, int64_t top, int64_t left,
                        int64_t first, const float *from, ptrdiff_t plane) {
    for (int64_t i = first; i < first + PANEL && i < c->outputs; i += LANES) {
        const float *here = from + (i - first);
        vec half[4][6], bias = c->bias ? *(const vec *)(c->bias + i) : (vec){0};
#pragma GCC unroll 6
        for (int x = 0; x < 6; x++) {
            vec m[6], y[4];
#pragma GCC unroll 6
            for (int r = 0; r < 6; r++) m[r] = *(const vec *)(here + (6 * r + x) * plane);
            transform_output(m, y);
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) half[r][x] = y[r];
        }
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            vec y[4];
            transform_output(half[r], y);
            if (top + r >= c->height) continue;
            float *to = c->result +
                        ((image * c->height + top + r) * c->width + left) * c->outputs + i;
#pragma GCC unroll 4
            for (int x = 0; x < 4; x++) {
                vec sum = y[x] + bias;
                if (left + x < c->width)
                    *(vec *)(to + x * c->outputs) = c->relu ? at_least_zero(sum) : sum;
            }
        }
    }
}

/* Transforms `count` tiles from `begin` on; those that fill up the last ROWS are zeros. */
static void input_tiles(const struct convolution *c, const struct tiles *t, int64_t begin,
                        int64_t count, float *to) {
    const struct maps m = {c->maps, c->zeros, c->height, c->width, c->channels};
    for (int64_t i = 0; i < count; i++) {
        int64_t image = (begin + i) / t->of_image, tile = (begin + i) % t->of_image;
        input_tile(m, image, tile / t->across * 4 - 1, tile % t->across * 4 - 1, to + i * t->row,
                   t->plane, ONE_BLOCK, 0);
    }
    for (int64_t i = count; i % ROWS; i++) /* whatever was there may be slow to multiply */
        for (int p = 0; p < 36; p++)
            memset(to + p * t->plane + i * t->row, 0, sizeof(float) * c->channels);
}

/* PANEL outputs, from `first` on, of `count` transformed tiles. */
static void output_tiles(const struct convolution *c, const struct tiles *t, int64_t begin,
                         int64_t count, int64_t first, const float *transformed,
                         const float *filters, float *products) {
    for (int p = 0; p < 36; p++)
        for (int64_t i = 0; i < count; i += ROWS) {
            vec sums[ROWS][2] = {{{0}}};
            multiply(transformed + p * t->plane + i * t->row, t->row, 1,
                     filters + p * t->filter_plane, c->channels, sums);
            float *to = products + p * t->product_plane + i * PANEL;
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; r++) {
                *(vec *)(to + r * PANEL) = sums[r][0];
                *(vec *)(to + r * PANEL + LANES) = sums[r][1];
            }
        }
    for (int64_t i = 0; i < count; i++) {
        int64_t image = (begin + i) / t->of_image, tile = (begin + i) % t->of_image;
        output_tile(c, image, tile / t->across * 4, tile % t->across * 4, first,
                    products + i * PANEL, t->product_plane);
    }
}

void winograd(const struct convolution *c) {
    const struct tiles t = tiles_of(c);
    const int64_t size = winograd_scratch(c), of_panel = c->channels * 9 * PANEL;
#pragma omp parallel num_threads(c->threads)
    {
        float *own = c->scratch + omp_get_thread_num() * size;
        float *products = own + size - 36 * t.product_plane;
        if (t.few) {
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < t.all; i += ROWS)
                input_tiles(c, &t, i, t.all - i < ROWS ? t.all - i : ROWS, c->shared + i * t.row);
#pragma omp for schedule(dynamic)
            for (int64_t panel = 0; panel < t.panels; panel++) {
                transform_panel(c->filters + panel * of_panel, c->channels, own, t.filter_plane);
                output_tiles(c, &t, 0, t.all, panel * PANEL, c->shared, own, products);
            }
        } else {
#pragma omp for schedule(dynamic)
            for (int64_t panel = 0; panel < t.panels; panel++)
                transform_panel(c->filters + panel * of_panel, c->channels,
                                c->shared + 36 * panel * t.filter_plane, t.filter_plane);
#pragma omp for schedule(dynamic)
            for (int64_t begin = 0; begin < t.all; begin += t.at_once) {
                const int64_t left = t.all - begin, count = left < t.at_once ? left : t.at_once;
                input_tiles(c, &t, begin, count, own);
                for (int64_t panel = 0; panel < t.panels; panel++)
                    output_tiles(c, &t, begin, count, panel * PANEL, own,
                                 c->shared + 36 * panel * t.filter_plane, products);
            }
        }
    }
}

/* The gradient of the filters. With the forward pass Y = A^T [(G g G^T) * (B^T d B)] A, it is
 * G^T [sum over tiles of (A dY A^T) * (B^T d B)] G: for each of the 36 points a product of matrices,
 * (outputs, tiles) by (tiles, channels). */
struct filter_gradient {
    const float *maps;      /* (images, height, width, channels) */
    const float *gradients; /* of the results: (images, height, width, outputs) */
    const float *zeros;     /* (max(channels, outputs),) */
    float *result;          /* (outputs, 3, 3, channels) */
    float *products;        /* (36, outputs, channels) */
    float *scratch;         /* filter_gradient_scratch() floats */
    int64_t images, height, width, channels, outputs, tiles_at_once;
    int32_t threads;
};

/* Where tiles_at_once transformed tiles are: of the maps (panels, tiles, PANEL), of the gradients
 * (tiles, outputs), filled up with zeros. */
struct tile_matrices {
    int64_t panels, of_panel, row;
    ptrdiff_t map_plane, gradient_plane;
};

static struct tile_matrices matrices_of(const struct filter_gradient *g) {
    struct tile_matrices m;
    m.panels = (g->channels + PANEL - 1) / PANEL, m.of_panel = g->tiles_at_once * PANEL;
    m.row = (g->outputs + ROWS - 1) / ROWS * ROWS;
    m.map_plane = m.panels * m.of_panel + APART;
    m.gradient_plane = g->tiles_at_once * m.row + APART;
    return m;
}

int64_t filter_gradient_scratch(const struct filter_gradient *g) {
    const struct tile_matrices m = matrices_of(g);
    return 36 * (m.map_plane + m.gradient_plane);
}

/* A dy along one axis. */
INLINE void transform_gradient(const vec dy[4], vec m[6]) {
    vec even_a = plus(all(A * A), dy[2], dy[0]), odd_a = plus(all(A * A), dy[3], dy[1]) * all(A);
    vec even_b = plus(all(B * B), dy[2], dy[0]), odd_b = plus(all(B * B), dy[3], dy[1]) * all(B);
    m[0] = dy[0];
    m[1] = even_a + odd_a, m[2] = even_a - odd_a;
    m[3] = even_b + odd_b, m[4] = even_b - odd_b;
    m[5] = dy[3];
}

/* G^T u along one axis. */
INLINE void gradient_of_filter(const vec u[6], vec g[3]) {
    const float a2 = A * A, b2 = B * B;
    const float at_a = 1 / (2 * a2 * (a2 - b2)), at_b = 1 / (2 * b2 * (b2 - a2));
    vec even_a = all(at_a) * (u[1] + u[2]), odd_a = all(at_a * A) * (u[1] - u[2]);
    vec even_b = all(at_b) * (u[3] + u[4]), odd_b = all(at_b * B) * (u[3] - u[4]);
    g[0] = plus(all(1 / (a2 * b2)), u[0], even_a + even_b);
    g[1] = odd_a + odd_b;
    g[2] = plus(all(a2), even_a, plus(all(b2), even_b, u[5]));
}

static void gradient_tile(const struct filter_gradient *g, int64_t image, int64_t top, int64_t left,
                          float *to, const struct tile_matrices *m) {
    const float *pixels[4][4];
    for (int y = 0; y < 4; y++)
        for (int x = 0; x < 4; x++) {
            int64_t row = top + y, column = left + x;
            pixels[y][x] = row < g->height && column < g->width
                               ? g->gradients +
                                     ((image * g->height + row) * g->width + column) * g->outputs
                               : g->zeros;
        }
    for (int64_t o = 0; o < g->outputs; o += LANES) {
        vec half[6][4];
#pragma GCC unroll 4
        for (int x = 0; x < 4; x++) {
            vec dy[4], done[6];
#pragma GCC unroll 4
            for (int y = 0; y < 4; y++) dy[y] = *(const vec *)(pixels[y][x] + o);
            transform_gradient(dy, done);
#pragma GCC unroll 6
            for (int y = 0; y < 6; y++) half[y][x] = done[y];
        }
#pragma GCC unroll 6
        for (int y = 0; y < 6; y++) {
            vec done[6];
            transform_gradient(half[y], done);
#pragma GCC unroll 6
            for (int x = 0; x < 6; x++)
                *(vec *)(to + (6 * y + x) * m->gradient_plane + o) = done[x];
        }
    }
    for (int p = 0; p < 36; p++)
        memset(to + p * m->gradient_plane + g->outputs, 0, sizeof(float) * (m->row - g->outputs));
}

/* Into panels; channels that fill up the last one are zeros. */
static void map_tile(const struct filter_gradient *g, int64_t image, int64_t top, int64_t left,
                     float *to, const struct tile_matrices *m) {
    const struct maps maps = {g->maps, g->zeros, g->height, g->width, g->channels};
    input_tile(maps, image, top, left, to, m->map_plane, PANEL, m->of_panel);
    if (g->channels % PANEL)
        for (int p = 0; p < 36; p++)
            *(vec *)(to + p * m->map_plane + (m->panels - 1) * m->of_panel + LANES) = (vec){0};
}

/* products[point][o][panel's channels] (+)= gradients, transposed, times maps, over `count` tiles. */
static void multiply_tiles(const struct filter_gradient *g, const struct tile_matrices *m, int point,
                           int64_t panel, int64_t count, int begins, const float *maps,
                           const float *gradients) {
    const int64_t first = panel * PANEL, left = g->channels - first;
    for (int64_t o = 0; o < g->outputs; o += ROWS) {
        vec sums[ROWS][2] = {{{0}}};
        multiply(gradients + o, 1, m->row, maps, count, sums);
        for (int64_t r = 0; r < ROWS && o + r < g->outputs; r++) {
            float *to = g->products + (point * g->outputs + o + r) * g->channels + first;
            for (int half = 0; half < 2 && half * LANES < left; half++, to += LANES) {
                vec sum = sums[r][half];
                if (!begins) sum += *(const vec *)to;
                *(vec *)to = sum;
            }
        }
    }
}

void filter_gradient(const struct filter_gradient *g) {
    const struct tile_matrices m = matrices_of(g);
    const int64_t across = (g->width + 3) / 4, of_image = (g->height + 3) / 4 * across;
    const int64_t all_tiles = g->images * of_image;
    float *maps = g->scratch, *gradients = g->scratch + 36 * m.map_plane;
#pragma omp parallel num_threads(g->threads)
    {
        for (int64_t begin = 0; begin < all_tiles; begin += g->tiles_at_once) {
            const int64_t left = all_tiles - begin;
            const int64_t count = left < g->tiles_at_once ? left : g->tiles_at_once;
#pragma omp for schedule(dynamic, 8)
            for (int64_t i = 0; i < count; i++) {
                int64_t image = (begin + i) / of_image, tile = (begin + i) % of_image;
                int64_t top = tile / across * 4, at = tile % across * 4;
                map_tile(g, image, top - 1, at - 1, maps + i * PANEL, &m);
                gradient_tile(g, image, top, at, gradients + i * m.row, &m);
            }
#pragma omp for schedule(dynamic)
            for (int64_t job = 0; job < 36 * m.panels; job++) {
                const int64_t point = job / m.panels, panel = job % m.panels;
                multiply_tiles(g, &m, point, panel, count, begin == 0,
                               maps + point * m.map_plane + panel * m.of_panel,
                               gradients + point * m.gradient_plane);
            }
        }
#pragma omp for schedule(static)
        for (int64_t o = 0; o < g->outputs; o++)
            for (int64_t i = 0; i < g->channels; i += LANES) {
                vec half[3][6];
#pragma GCC unroll 6
                for (int x = 0; x < 6; x++) {
                    vec u[6], done[3];
#pragma GCC unroll 6
                    for (int y = 0; y < 6; y++)
                        u[y] = *(const vec *)(g->products +
                                              ((6 * y + x) * g->outputs + o) * g->channels + i);
                    gradient_of_filter(u, done);
#pragma GCC unroll 3
                    for (int y = 0; y < 3; y++) half[y][x] = done[y];
                }
#pragma GCC unroll 3
                for (int y = 0; y < 3; y++) {
                    vec done[3];
                    gradient_of_filter(half[y], done);
#pragma GCC unroll 3
                    for (int x = 0; x < 3; x++)
                        *(vec *)(g->result + ((o * 3 + y) * 3 + x) * g->channels + i) = done[x];
                }
            }
    }
}

/* ------------------------------------------------- fully connected layers, 1x1 convolutions */

struct product {
    const float *rows;   /* pixels or boxes, `depth` floats each */
    const float *panels; /* of each depth_at_once: (outputs / PANEL rounded up, depth, PANEL) */
    const float *bias;   /* (outputs,) or NULL */
    const float *added;  /* (count, outputs), added before the ReLU, or NULL; may be the result */
    float *result;       /* (count, outputs) */
    float *scratch;      /* rows_at_once * depth_at_once floats for each thread */
    int64_t count, depth, outputs;
    /* Row i is at pixel (i / width / height, i / width % height * stride, i % width * stride) of
     * maps of full_height x full_width; all 1 and count for a matrix. */
    int64_t height, width, full_height, full_width, stride;
    int64_t rows_at_once, columns_at_once, depth_at_once; /* of a job; whole panels */
    int32_t relu, threads;
};

INLINE const float *source_row(const struct product *p, int64_t i) {
    if (p->stride == 1) return p->rows + i * p->depth;
    int64_t x = i % p->width, y = i / p->width % p->height, image = i / p->width / p->height;
    return p->rows +
           ((image * p->full_height + y * p->stride) * p->full_width + x * p->stride) * p->depth;
}

/* (count, depth) from `first`, `begin` on -> (count / ROWS, depth, ROWS), zeros after the last. */
static void pack_rows(const struct product *p, int64_t first, int64_t count, int64_t begin,
                      int64_t depth, float *to) {
    static const float zeros[LANES];
    for (int64_t i = 0; i < count; i += ROWS, to += depth * ROWS) {
        const float *from[ROWS];
        for (int r = 0; r < ROWS; r++)
            from[r] = i + r < count ? source_row(p, first + i + r) + begin : NULL;
        for (int64_t part = 0; part < depth; part += LANES) /* what is written stays in L1 */
            for (int r = 0; r < ROWS; r++) {
                const float *here = from[r] ? from[r] + part : zeros;
                const int64_t size = depth - part < LANES ? depth - part : LANES;
                for (int64_t k = 0; k < size; k++) to[(part + k) * ROWS + r] = here[k];
            }
    }
}

static void store_rows(const struct product *p, int64_t row, int64_t count, int64_t first,
                       int begins, int ends, vec sums[ROWS][2]) {
    for (int64_t r = 0; r < count; r++) {
        float *to = p->result + (row + r) * p->outputs + first;
        const float *added = p->added ? p->added + (row + r) * p->outputs + first : NULL;
        for (int half = 0; half < 2; half++) {
            int64_t i = half * LANES, left = p->outputs - first - i;
            if (left <= 0) break;
            float whole[LANES];
            vec sum = sums[r][half];
            size_t bytes = sizeof(float) * (left < LANES ? left : LANES);
#define READ(from) (left >= LANES ? *(const vec *)(from) : (memcpy(whole, from, bytes), *(vec *)whole))
            if (!begins) sum += READ(to + i);
            if (begins && added) sum += READ(added + i); /* before it is overwritten */
            if (ends) {
                if (p->bias) sum += READ(p->bias + first + i);
                if (p->relu) sum = at_least_zero(sum);
            }
            if (left >= LANES)
                *(vec *)(to + i) = sum;
            else
                memcpy(to + i, &sum, bytes);
        }
    }
}

void product(const struct product *p) {
    const int64_t most = p->rows_at_once, wide = p->columns_at_once;
    const int64_t down = (p->count + most - 1) / most, across = (p->outputs + wide - 1) / wide;
    const int64_t padded = (p->outputs + PANEL - 1) / PANEL * PANEL;
#pragma omp parallel for schedule(dynamic) num_threads(p->threads)
    for (int64_t job = 0; job < down * across; job++) {
        float *packed = p->scratch + omp_get_thread_num() * most * p->depth_at_once;
        const int64_t first_row = job / across * most, first_column = job % across * wide;
        const int64_t count = p->count - first_row < most ? p->count - first_row : most;
        /* These are read where they lie, the others are gathered. */
        const int64_t whole = p->stride == 1 ? count / ROWS * ROWS : 0;
        const int64_t end = first_column + wide < p->outputs ? first_column + wide : p->outputs;
        for (int64_t begin = 0; begin < p->depth; begin += p->depth_at_once) {
            const int64_t left = p->depth - begin;
            const int64_t depth = left < p->depth_at_once ? left : p->depth_at_once;
            pack_rows(p, first_row + whole, count - whole, begin, depth, packed);
            for (int64_t first = first_column; first < end; first += PANEL) {
                const float *panel = p->panels + begin * padded + first * depth;
                for (int64_t i = 0; i < count; i += ROWS) {
                    vec sums[ROWS][2] = {{{0}}};
                    if (i < whole)
                        multiply(p->rows + (first_row + i) * p->depth + begin, p->depth, 1, panel,
                                 depth, sums);
                    else
                        multiply(packed + (i - whole) * depth, 1, ROWS, panel, depth, sums);
                    store_rows(p, first_row + i, count - i < ROWS ? count - i : ROWS, first,
                               begin == 0, depth == left, sums);
                }
            }
        }
    }
}

/* ------------------------------------------------------------------------------- RoIAlign */

struct pooling {
    const void *const *maps; /* one for each level: (images, heights[l], widths[l], channels) */
    const int64_t *heights, *widths;
    const float *scales;  /* 1 / stride of each level */
    const float *boxes;   /* (count, 5): image, x1, y1, x2, y2 in pixels of the network input */
    const int64_t *level; /* (count,): index of the map a box is pooled from */
    void *result;         /* (count, bins_y, bins_x, channels) */
    char *scratch;        /* scratch_size bytes for each thread */
    int64_t count, channels, bins_y, bins_x, scratch_size;
    int32_t sampling_ratio, aligned, half, threads; /* half: maps and result are bfloat16 */
};

/* The cells that the bins along one axis read: bin b has weight[b * cells + i] on
 * cell[b * cells + i], for i < taps[b], in ascending order. */
struct axis {
    int64_t *taps, *cell;
    float *weight;
    int64_t cells;
};

static int64_t axis_size(int64_t bins, int64_t cells) {
    return bins * (sizeof(int64_t) + cells * (sizeof(int64_t) + sizeof(float)));
}

int64_t pooling_scratch(int64_t bins_y, int64_t bins_x, int64_t height, int64_t width,
                        int64_t channels, int32_t half) {
    int64_t rows = 2 + (half ? bins_y : 0); /* of bins, in float32 */
    int64_t bytes = axis_size(bins_y, height) + axis_size(bins_x, width) +
                    rows * bins_x * channels * sizeof(float) + sizeof(int64_t);
    return (bytes + 63) / 64 * 64;
}

/* A sample's cell is one of the last two, or new, if samples come in ascending order: `back` is 2.
 * They do not in a box of negative size. */
static void weigh_cell(struct axis *axis, int64_t bin, int64_t cell, float weight, int64_t back) {
    int64_t *cells = axis->cell + bin * axis->cells, *taps = axis->taps + bin, at = *taps;
    float *weights = axis->weight + bin * axis->cells;
    for (int64_t i = at - 1; i >= 0 && i >= at - back; i--)
        if (cells[i] == cell) {
            weights[i] += weight;
            return;
        }
    cells[at] = cell;
    weights[at] = weight;
    *taps = at + 1;
}

/* torchvision's samples, in its order and precision: each on two cells, or on one at the border, or
 * on none outside. (Fused multiply-adds could turn seven samples into eight.) */
static void weigh_cells(float low, float high, float scale, int64_t bins, int32_t sampling_ratio,
                        int32_t aligned, struct axis *axis) {
    const float offset = aligned ? 0.5f : 0.0f;
    const float start = low * scale - offset, end = high * scale - offset;
    float size = end - start;
    if (!aligned && size < 1) size = 1;
    const float bin = size / bins;
    const int64_t samples = sampling_ratio > 0 ? sampling_ratio : (int64_t)ceilf(size / bins);
    const int64_t back = size < 0 ? axis->cells : 2;
    for (int64_t b = 0; b < bins; b++) {
        axis->taps[b] = 0;
        for (int64_t s = 0; s < samples; s++) {
            float at = start + b * bin + (s + 0.5f) * bin / samples;
            if (at < -1 || at > axis->cells) continue;
            if (at < 0) at = 0;
            int64_t lower = (int64_t)at, upper = lower + 1;
            if (upper >= axis->cells) upper = lower = axis->cells - 1, at = lower;
            weigh_cell(axis, b, lower, (1 - (at - lower)) / samples, back);
            weigh_cell(axis, b, upper, (at - lower) / samples, back);
        }
    }
}

/* To the nearest bfloat16, of two the even one. (NaN of maps and sums have nothing to be rounded.) */
static void round_to_half(const float *from, int64_t count, uint16_t *to) {
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, from + i, sizeof bits);
        to[i] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
}

/* Channels summed at once, in registers. */
enum { STRIP = 4 };

INLINE void sum_of_cells(const void *map, ptrdiff_t first, ptrdiff_t apart, const struct axis *x,
                         int64_t bin, const int strip, const int half, float *to) {
    const int64_t *cell = x->cell + bin * x->cells;
    const float *weight = x->weight + bin * x->cells;
    vec sums[STRIP] = {{0}};
    for (int64_t i = 0; i < x->taps[bin]; i++)
#pragma GCC unroll 4
        for (int j = 0; j < strip; j++)
            sums[j] = plus(all(weight[i]),
                           read_map(map, first + cell[i] * apart + j * LANES, half), sums[j]);
#pragma GCC unroll 4
    for (int j = 0; j < strip; j++) *(vec *)(to + j * LANES) = sums[j];
}

/* A row of cells is summed along x once for each bin, then added to the bins along y that read it:
 * neighbouring bins share two rows at most. */
INLINE void pool_box(const struct pooling *p, const void *map, int64_t first, int64_t width,
                     const struct axis *y, const struct axis *x, float *along_x, float *to,
                     const int strip, const int half, int64_t channel) {
    const int64_t channels = p->channels, size = p->bins_x * strip * LANES;
    int64_t summed[2] = {-1, -1};
    for (int64_t b = 0; b < p->bins_y; b++)
        for (int64_t i = 0; i < y->taps[b]; i++) {
            const int64_t row = y->cell[b * y->cells + i];
            float *sums = along_x + (row & 1) * size;
            if (summed[row & 1] != row)
                for (int64_t a = 0; a < p->bins_x; a++)
                    sum_of_cells(map, first + row * width * channels + channel, channels, x, a,
                                 strip, half, sums + a * strip * LANES);
            summed[row & 1] = row;
            const vec weight = all(y->weight[b * y->cells + i]);
            for (int64_t a = 0; a < p->bins_x; a++)
#pragma GCC unroll 4
                for (int j = 0; j < strip; j++) {
                    vec *bin = (vec *)(to + (b * p->bins_x + a) * channels + channel + j * LANES);
                    *bin = plus(weight, *(const vec *)(sums + (a * strip + j) * LANES), *bin);
                }
        }
}

INLINE void pool_channels(const struct pooling *p, const void *map, int64_t first, int64_t width,
                          const struct axis *y, const struct axis *x, float *along_x, float *to,
                          const int half) {
    int64_t channel = 0;
    for (; channel + STRIP * LANES <= p->channels; channel += STRIP * LANES)
        pool_box(p, map, first, width, y, x, along_x, to, STRIP, half, channel);
    for (; channel + LANES <= p->channels; channel += LANES)
        pool_box(p, map, first, width, y, x, along_x, to, 1, half, channel);
}

void pool(const struct pooling *p) {
#pragma omp parallel for schedule(dynamic, 8) num_threads(p->threads)
    for (int64_t box = 0; box < p->count; box++) {
        const float *roi = p->boxes + 5 * box;
        const int64_t level = p->level[box], image = (int64_t)roi[0];
        const int64_t height = p->heights[level], width = p->widths[level];
        char *free = p->scratch + omp_get_thread_num() * p->scratch_size;
        struct axis y = {.cells = height}, x = {.cells = width};
#define TAKE(type, count) (void *)free; free += sizeof(type) * (count)
        y.taps = TAKE(int64_t, p->bins_y);
        x.taps = TAKE(int64_t, p->bins_x);
        y.cell = TAKE(int64_t, p->bins_y * height);
        x.cell = TAKE(int64_t, p->bins_x * width);
        y.weight = TAKE(float, p->bins_y * height);
        x.weight = TAKE(float, p->bins_x * width);
        float *along_x = (void *)free;
        weigh_cells(roi[2], roi[4], p->scales[level], p->bins_y, p->sampling_ratio, p->aligned, &y);
        weigh_cells(roi[1], roi[3], p->scales[level], p->bins_x, p->sampling_ratio, p->aligned, &x);
        const int64_t first = image * height * width * p->channels;
        const int64_t size = p->bins_y * p->bins_x * p->channels;
        float *to = p->half ? along_x + 2 * p->bins_x * p->channels : (float *)p->result + box * size;
        memset(to, 0, sizeof(float) * size);
        if (p->half) {
            pool_channels(p, p->maps[level], first, width, &y, &x, along_x, to, 1);
            round_to_half(to, size, (uint16_t *)p->result + box * size);
        } else {
            pool_channels(p, p->maps[level], first, width, &y, &x, along_x, to, 0);
        }
    }
}

/* ---------------------------------------------------------------- max pooling of the stem's map */

struct max_pooling {
    const void *maps; /* (images, height, width, channels) */
    void *result;     /* (images, height / 2 and width / 2 rounded up, channels) */
    int64_t images, height, width, channels;
    int32_t half, threads; /* half: both are bfloat16 */
};

/* A row of the largest of 3x3 pixels with stride 2, or of those that there are at the border. */
INLINE void max_pool_row(const struct max_pooling *p, int64_t image, int64_t row, void *result,
                         ptrdiff_t to, const int half) {
    const int64_t top = row ? 2 * row - 1 : 0;
    const int64_t bottom = 2 * row + 2 < p->height ? 2 * row + 2 : p->height;
    for (int64_t x = 0; x < p->width; x += 2, to += p->channels) {
        const int64_t left = x ? x - 1 : 0, right = x + 2 < p->width ? x + 2 : p->width;
        for (int64_t i = 0; i < p->channels; i += LANES) {
            vec most = all(-INFINITY);
            for (int64_t at_y = top; at_y < bottom; at_y++) {
                const int64_t line = (image * p->height + at_y) * p->width;
                for (int64_t at_x = left; at_x < right; at_x++) {
                    vec value = read_map(p->maps, (line + at_x) * p->channels + i, half);
                    mask larger = value > most | value != value; /* NaN stays, whatever it meets */
                    most = (vec)((larger & (mask)value) | (~larger & (mask)most));
                }
            }
            write_map(result, to + i, half, most);
        }
    }
}

void max_pool(const struct max_pooling *p) {
    const int64_t rows = (p->height + 1) / 2, size = (p->width + 1) / 2 * p->channels;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (int64_t i = 0; i < p->images * rows; i++) {
        if (p->half)
            max_pool_row(p, i / rows, i % rows, p->result, i * size, 1);
        else
            max_pool_row(p, i / rows, i % rows, p->result, i * size, 0);
    }
}

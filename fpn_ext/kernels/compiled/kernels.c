/* What the pyramid spends its time on, compiled for this processor: fpn_ext/kernels/compiled builds
 * this file once with AVX2 (LANES 8) and once with AVX-512 (LANES 16). Multiply-adds are fused where
 * the code says so (`plus`), and nowhere else.
 *
 * Maps are float32 and channels_last: a pixel's channels lie side by side. Vectors run along
 * channels. Work is divided among OpenMP's threads, those of torch itself.
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

/* F(4x4, 3x3) at the points 0, +-A, +-B and infinity; the filters come transformed and divided by
 * what is left out here (fpn_ext/kernels/winograd.py). */
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

/* Filters of a convolution, transformed: G g G^T, as winograd() reads them. */
struct filters {
    const float *weight; /* weight[o * strides[0] + i * strides[1] + y * strides[2] + x * strides[3]] */
    float *result;       /* (outputs / PANEL rounded up, 36, channels, PANEL) */
    int64_t outputs, channels, strides[4];
    int32_t threads;
};

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

void transform_filters(const struct filters *f) {
    const int64_t panels = (f->outputs + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static) collapse(2) num_threads(f->threads)
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t i = 0; i < f->channels; i++)
            for (int half = 0; half < 2; half++) {
                vec half_done[6][3], u[6];
                for (int x = 0; x < 3; x++) {
                    vec g[3];
                    for (int y = 0; y < 3; y++)
                        for (int lane = 0; lane < LANES; lane++) {
                            int64_t o = panel * PANEL + half * LANES + lane;
                            const float *from = f->weight + i * f->strides[1] + y * f->strides[2] +
                                                x * f->strides[3];
                            g[y][lane] = o < f->outputs ? from[o * f->strides[0]] : 0;
                        }
                    transform_filter(g, u);
                    for (int y = 0; y < 6; y++) half_done[y][x] = u[y];
                }
                for (int y = 0; y < 6; y++) {
                    transform_filter(half_done[y], u);
                    for (int x = 0; x < 6; x++) {
                        int64_t row = (panel * 36 + 6 * y + x) * f->channels + i;
                        *(vec *)(f->result + row * PANEL + half * LANES) = u[x];
                    }
                }
            }
}

struct convolution {
    const float *maps;    /* (images, height, width, channels) */
    const float *filters; /* (outputs / PANEL rounded up, 36, channels, PANEL) */
    const float *bias;    /* (outputs,) or NULL */
    const float *zeros;   /* (channels,) */
    float *result;        /* (images, height, width, outputs) */
    float *scratch;       /* scratch_size floats for each thread */
    int64_t images, height, width, channels, outputs, tiles_at_once, scratch_size;
    int32_t relu, threads;
};

/* A multiple of 4096 bytes between planes would have them compete for the same cache lines. */
enum { APART = 272 };

int64_t winograd_scratch(int64_t channels, int64_t tiles_at_once) {
    return 36 * (tiles_at_once * (channels + LANES) + APART) +
           36 * (tiles_at_once * PANEL + APART);
}

static void input_tile(const struct convolution *c, int64_t image, int64_t top, int64_t left,
                       float *to, ptrdiff_t plane) {
    const float *pixels[6][6];
    for (int y = 0; y < 6; y++)
        for (int x = 0; x < 6; x++) {
            int64_t row = top + y, column = left + x;
            int inside = 0 <= row && row < c->height && 0 <= column && column < c->width;
            pixels[y][x] =
                inside ? c->maps + ((image * c->height + row) * c->width + column) * c->channels
                       : c->zeros;
        }
    for (int64_t i = 0; i < c->channels; i += LANES) {
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
            for (int x = 0; x < 6; x++) *(vec *)(to + (6 * y + x) * plane + i) = v[x];
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

void winograd(const struct convolution *c) {
    const int64_t across = (c->width + 3) / 4, tiles = (c->height + 3) / 4 * across;
    const int64_t most = c->tiles_at_once, jobs = (c->images * tiles + most - 1) / most;
    const ptrdiff_t row = c->channels + LANES, plane = most * row + APART;
    const ptrdiff_t product_plane = most * PANEL + APART;
#pragma omp parallel for schedule(dynamic) num_threads(c->threads)
    for (int64_t job = 0; job < jobs; job++) {
        float *transformed = c->scratch + omp_get_thread_num() * c->scratch_size;
        float *products = transformed + 36 * plane;
        const int64_t begin = job * most, left = c->images * tiles - begin;
        const int64_t count = left < most ? left : most;
        const int64_t padded = (count + ROWS - 1) / ROWS * ROWS;
        for (int64_t t = 0; t < count; t++) {
            int64_t image = (begin + t) / tiles, tile = (begin + t) % tiles;
            input_tile(c, image, tile / across * 4 - 1, tile % across * 4 - 1,
                       transformed + t * row, plane);
        }
        for (int64_t t = count; t < padded; t++) /* whatever was there may be slow to multiply */
            for (int p = 0; p < 36; p++)
                memset(transformed + p * plane + t * row, 0, sizeof(float) * c->channels);
        const float *panel = c->filters;
        for (int64_t first = 0; first < c->outputs; first += PANEL) {
            for (int p = 0; p < 36; p++, panel += c->channels * PANEL)
                for (int64_t t = 0; t < padded; t += ROWS) {
                    vec sums[ROWS][2] = {{{0}}};
                    multiply(transformed + p * plane + t * row, row, 1, panel, c->channels, sums);
                    float *to = products + p * product_plane + t * PANEL;
#pragma GCC unroll 12
                    for (int r = 0; r < ROWS; r++) {
                        *(vec *)(to + r * PANEL) = sums[r][0];
                        *(vec *)(to + r * PANEL + LANES) = sums[r][1];
                    }
                }
            for (int64_t t = 0; t < count; t++) {
                int64_t image = (begin + t) / tiles, tile = (begin + t) % tiles;
                output_tile(c, image, tile / across * 4, tile % across * 4, first,
                            products + t * PANEL, product_plane);
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
    const float *const *maps; /* one for each level: (images, heights[l], widths[l], channels) */
    const int64_t *heights, *widths;
    const float *scales;  /* 1 / stride of each level */
    const float *boxes;   /* (count, 5): image, x1, y1, x2, y2 in pixels of the network input */
    const int64_t *level; /* (count,): index of the map a box is pooled from */
    float *result;        /* (count, bins_y, bins_x, channels) */
    char *scratch;        /* scratch_size bytes for each thread */
    int64_t count, channels, bins_y, bins_x, scratch_size;
    int32_t sampling_ratio, aligned, threads;
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
                        int64_t channels) {
    int64_t bytes = axis_size(bins_y, height) + axis_size(bins_x, width) +
                    2 * bins_x * channels * sizeof(float) + sizeof(int64_t);
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

/* Channels summed at once, in registers. */
enum { STRIP = 4 };

INLINE void sum_of_cells(const float *row, ptrdiff_t apart, const struct axis *x, int64_t bin,
                         const int strip, float *to) {
    const int64_t *cell = x->cell + bin * x->cells;
    const float *weight = x->weight + bin * x->cells;
    vec sums[STRIP] = {{0}};
    for (int64_t i = 0; i < x->taps[bin]; i++)
#pragma GCC unroll 4
        for (int j = 0; j < strip; j++)
            sums[j] = plus(all(weight[i]), *(const vec *)(row + cell[i] * apart + j * LANES), sums[j]);
#pragma GCC unroll 4
    for (int j = 0; j < strip; j++) *(vec *)(to + j * LANES) = sums[j];
}

/* A row of cells is summed along x once for each bin, then added to the bins along y that read it:
 * neighbouring bins share two rows at most. */
INLINE void pool_box(const struct pooling *p, const float *map, int64_t width, const struct axis *y,
                     const struct axis *x, float *along_x, float *to, const int strip,
                     int64_t channel) {
    const int64_t channels = p->channels, size = p->bins_x * strip * LANES;
    int64_t summed[2] = {-1, -1};
    for (int64_t b = 0; b < p->bins_y; b++)
        for (int64_t i = 0; i < y->taps[b]; i++) {
            const int64_t row = y->cell[b * y->cells + i];
            float *sums = along_x + (row & 1) * size;
            if (summed[row & 1] != row)
                for (int64_t a = 0; a < p->bins_x; a++)
                    sum_of_cells(map + row * width * channels + channel, channels, x, a, strip,
                                 sums + a * strip * LANES);
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
        const float *map = p->maps[level] + image * height * width * p->channels;
        const int64_t size = p->bins_y * p->bins_x * p->channels;
        float *to = p->result + box * size;
        memset(to, 0, sizeof(float) * size);
        int64_t channel = 0;
        for (; channel + STRIP * LANES <= p->channels; channel += STRIP * LANES)
            pool_box(p, map, width, &y, &x, along_x, to, STRIP, channel);
        for (; channel + LANES <= p->channels; channel += LANES)
            pool_box(p, map, width, &y, &x, along_x, to, 1, channel);
    }
}

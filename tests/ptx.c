// What the C that ptx.py makes of a kernel runs on: memory, warps that take turns, matrix instructions, the copy engine.

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define DONE (1 << 30)
#define STACK (1 << 18)
#define COPIES 4096
#define LANES for (int l = 0; l < 32; l++) if (mask >> l & 1)
#define FAIL(...) do { snprintf(error, sizeof error, __VA_ARGS__); longjmp(failed, 1); } while (0)

struct Range { uint64_t start, end; };  // of a tensor
struct Map {  // a descriptor of the copy engine; strides in bytes
    uint64_t base;
    int64_t rows, columns, stride;
    int32_t box_rows, box_columns, size, swizzle;
};
struct Copy { uint64_t from; uint32_t to, size, given; int group; };
struct Registers {
/*REGISTERS*/
};
struct Warp {
    ucontext_t context;
    char* stack;
    struct Registers* registers;
    struct Copy* copy;
    const uint8_t* params;
    uint32_t ctaid[3], nctaid[3];
    enum { RUNS, AT_BARRIER, OVER } state;
    int id, group, copies, waits, pc[32];
};

static char error[400];
static jmp_buf failed;
static ucontext_t scheduler;
static struct Warp* current;
static struct Range* ranges;
static int range_count;
static uint8_t* memory;  // shared
static uint32_t memory_size;
static int epoch;  // counts barriers
static struct { int written, read; uint32_t writers, readers; }* seen;  // for each shared byte, when and by which warps

static inline float f32(uint32_t x) { float y; memcpy(&y, &x, 4); return y; }
static inline double f64(uint64_t x) { double y; memcpy(&y, &x, 8); return y; }
static inline uint32_t of_f32(float x) { uint32_t y; memcpy(&y, &x, 4); return y; }
static inline uint64_t of_f64(double x) { uint64_t y; memcpy(&y, &x, 8); return y; }
static inline float ftz(float x) { return fpclassify(x) == FP_SUBNORMAL ? copysignf(0, x) : x; }
static float bf16(uint16_t x) { return f32((uint32_t)x << 16); }
static float f16(uint16_t x) {
    int e = x >> 10 & 31, m = x & 1023;
    float y = e == 31 ? (m ? NAN : INFINITY) : e ? ldexpf(1024 + m, e - 25) : ldexpf(m, -24);
    return x >> 15 ? -y : y;
}
static uint16_t of_bf16(float x) {
    uint32_t y = of_f32(x);
    return isnan(x) ? 0x7fff : (y + 0x7fff + (y >> 16 & 1)) >> 16;
}
static uint16_t of_f16(float x) {
    uint16_t sign = signbit(x) ? 0x8000 : 0;
    int e;
    x = fabsf(x);
    if (isnan(x)) return 0x7fff;
    if (x >= 65520) return sign | 0x7c00;
    if (x < 0x1p-14f) return sign | (uint16_t)rintf(ldexpf(x, 24));
    frexpf(x, &e);
    return sign + (uint16_t)((e + 13) * 1024 + (int)rintf(ldexpf(x, 11 - e)));
}
// Warps

static void together(uint32_t lanes) { if (lanes != ~0u) FAIL("lanes %08x alone at an instruction of the warp", lanes); }
static void wait(struct Warp* w) {
    if (++w->waits > 100000) FAIL("warp %d waits for copies that do not arrive", w->id);
    swapcontext(&w->context, &scheduler);
}
static void barrier(struct Warp* w) {
    w->state = AT_BARRIER;
    w->waits = 0;
    swapcontext(&w->context, &scheduler);
}

// Memory

static void* global(uint64_t at, int n, const char* verb) {
    static int last;
    if (at % n) FAIL("%s of %d bytes at global address %lx", verb, n, at);
    if (last < range_count && ranges[last].start <= at && at + n <= ranges[last].end) return (void*)at;
    for (last = 0; last < range_count; last++)
        if (ranges[last].start <= at && at + n <= ranges[last].end) return (void*)at;
    FAIL("%s of %d bytes outside every tensor", verb, n);
}
static void* shared(struct Warp* w, uint32_t at, int n, const void* written) {
    uint32_t me = 1u << w->id;
    if (at % n || at + n > memory_size) FAIL("%d bytes at shared address %u of %u", n, at, memory_size);
    for (uint32_t i = at; CHECKED && i < at + n; i++) {
        if (seen[i].written != epoch) seen[i].writers = 0;
        if (seen[i].read != epoch) seen[i].readers = 0;
        int changes = written && memory[i] != ((const uint8_t*)written)[i - at];
        if ((changes || !written) && seen[i].writers && !(seen[i].writers & me))
            FAIL("warp %d comes to shared byte %u, which others wrote since the last barrier", w->id, i);
        if (changes && seen[i].readers & ~me)
            FAIL("warp %d writes to shared byte %u, which others read since the last barrier", w->id, i);
        if (written) { seen[i].written = epoch; seen[i].writers |= me; }
        else { seen[i].read = epoch; seen[i].readers |= me; }
    }
    return memory + at;
}
static const void* load_param(struct Warp* w, uint64_t at, int n) { return w->params + at; }
static const void* load_global(struct Warp* w, uint64_t at, int n) { return global(at, n, "read"); }
static const void* load_shared(struct Warp* w, uint64_t at, int n) { return shared(w, at, n, 0); }
static void store_global(struct Warp* w, uint64_t at, const void* x, int n) { memcpy(global(at, n, "write"), x, n); }
static void store_shared(struct Warp* w, uint64_t at, const void* x, int n) { memcpy(shared(w, at, n, x), x, n); }

// cp.async: each copy happens as late as it may.
static void copy_later(struct Warp* w, uint32_t to, uint64_t from, uint32_t size, uint32_t given) {
    if (w->copies == COPIES) FAIL("more than %d copies on their way", COPIES);
    w->copy[w->copies++] = (struct Copy){from, to, size, given, w->group};
}
static void copy_now(struct Warp* w, int groups_left) {
    int left = 0;
    for (int i = 0; i < w->copies; i++) {
        struct Copy c = w->copy[i];
        uint8_t bytes[16] = {0};
        if (c.group >= w->group - groups_left) { w->copy[left++] = c; continue; }
        if (c.given) memcpy(bytes, global(c.from, c.given, "copy"), c.given);
        store_shared(w, c.to, bytes, c.size);
    }
    w->copies = left;
}

// Matrices of 16-bit numbers, their products exact, summed in float64 and rounded to fp32 once an instruction

static void mma_m16n8k16(uint32_t a[32][4], uint32_t b[32][2], float d[32][4], float (*number)(uint16_t)) {
    float A[16][16], B[16][8];
    for (int l = 0; l < 32; l++)
        for (int h = 0; h < 2; h++) {
            for (int i = 0; i < 4; i++) A[l / 4 + 8 * (i & 1)][2 * (l % 4) + h + 8 * (i >> 1)] = number(a[l][i] >> 16 * h);
            for (int i = 0; i < 2; i++) B[2 * (l % 4) + h + 8 * i][l / 4] = number(b[l][i] >> 16 * h);
        }
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++) {
            double sum = d[l][i];
            for (int k = 0; k < 16; k++) sum += (double)A[l / 4 + 8 * (i >> 1)][k] * B[k][2 * (l % 4) + (i & 1)];
            d[l][i] = sum;
        }
}
static void ldmatrix(struct Warp* w, uint32_t at[32], uint32_t v[4][32], int n) {
    for (int j = 0; j < n; j++)
        for (int i = 0; i < 8; i++) memcpy(&v[j][4 * i], load_shared(w, at[8 * j + i], 16), 16);
}
static void stmatrix(struct Warp* w, uint32_t at[32], uint32_t v[4][32], int n) {
    for (int j = 0; j < n; j++)
        for (int i = 0; i < 8; i++) store_shared(w, at[8 * j + i], &v[j][4 * i], 16);
}

// Hopper: shared memory is swizzled (1, 2, 3: in 32, 64, 128 bytes), copies count their bytes on a barrier.

static uint32_t swizzled(uint32_t at, int swizzle) { return at ^ (at >> 3 & ((1 << swizzle) - 1) << 4); }

struct Mbarrier { uint16_t count, pending; int32_t bytes : 31; uint32_t phase : 1; };

static struct Mbarrier* mbarrier(uint32_t at) {
    if (at % 8 || at + 8 > memory_size) FAIL("a barrier at shared address %u of %u", at, memory_size);
    return (struct Mbarrier*)(memory + at);
}
static void mbarrier_count(struct Mbarrier* b, int bytes, int arrivals) {
    b->bytes += bytes;
    b->pending -= arrivals;
    if (b->pending == 0 && b->bytes == 0) { b->phase ^= 1; b->pending = b->count; }
}
static void tma(struct Map* m, int x, int y, uint32_t at, int store) {
    if (at % 128) FAIL("a tile at shared address %u", at);
    for (int i = 0; i < m->box_rows; i++)
        for (int j = 0; j < m->box_columns; j++) {
            int64_t r = (int64_t)y + i, c = (int64_t)x + j;
            int outside = r < 0 || r >= m->rows || c < 0 || c >= m->columns;
            uint32_t to = swizzled(at + (i * m->box_columns + j) * m->size, m->swizzle);
            uint64_t from = m->base + r * m->stride + c * m->size;
            if (to + m->size > memory_size) FAIL("a tile at shared address %u beyond %u", at, memory_size);
            if (outside && !store) memset(memory + to, 0, m->size);
            else if (!outside && store) memcpy(global(from, m->size, "write"), memory + to, m->size);
            else if (!outside) memcpy(memory + to, global(from, m->size, "copy"), m->size);
        }
}
static uint16_t element(uint64_t descriptor, int row, int k) {
    int swizzle = (int[]){0, 3, 2, 1}[descriptor >> 62];
    uint32_t start = (descriptor & 0x3fff) << 4, eight_rows = (descriptor >> 32 & 0x3fff) << 4;
    uint32_t at = swizzled(start + row / 8 * eight_rows + row % 8 * (16 << swizzle) + 2 * k, swizzle);
    uint16_t x;
    if (at + 2 > memory_size) FAIL("a matrix at shared address %u of %u", at, memory_size);
    memcpy(&x, memory + at, 2);
    return x;
}
static void wgmma_k16(struct Warp* w, float* d, int n, uint64_t a, uint64_t b, int add, float (*number)(uint16_t)) {
    float A[16][16], B[16];  // of the four warps' 64 rows this one's
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++) A[i][k] = number(element(a, 16 * (w->id % 4) + i, k));
    for (int c = 0; c < n; c++) {
        for (int k = 0; k < 16; k++) B[k] = number(element(b, c, k));
        for (int i = 0; i < 16; i++) {
            float* x = d + (4 * (i % 8) + c % 8 / 2) * (n / 2) + 4 * (c / 8) + 2 * (i / 8) + c % 2;
            double sum = add ? *x : 0;
            for (int k = 0; k < 16; k++) sum += (double)A[i][k] * B[k];
            *x = sum;
        }
    }
}

// The kernel

/*BLOCKS*/

static void (*const blocks[])(struct Warp*, struct Registers*, uint32_t, int*) = {/*TABLE*/};

static void run_warp(void) {
    struct Warp* w = current;
    for (;;) {  // lanes that parted meet again where the last of them is
        int pc = DONE;
        uint32_t mask = 0;
        for (int l = 0; l < 32; l++) if (w->pc[l] < pc) pc = w->pc[l];
        if (pc == DONE) break;
        for (int l = 0; l < 32; l++) if (w->pc[l] == pc) { mask |= 1u << l; w->pc[l]++; }
        blocks[pc](w, w->registers, mask, w->pc);
    }
    w->state = OVER;
    swapcontext(&w->context, &scheduler);
}

static void run_program(struct Warp* warp, int warps, int backwards) {
    for (int over = 0; over < warps;) {
        int running = 0;
        over = 0;
        for (int i = 0; i < warps; i++) {
            current = warp + (backwards ? warps - 1 - i : i);
            if (current->state == RUNS) swapcontext(&scheduler, &current->context);
            running += current->state == RUNS;
            over += current->state == OVER;
        }
        if (running) continue;
        epoch++;
        for (int i = 0; i < warps; i++) if (warp[i].state == AT_BARRIER) warp[i].state = RUNS;
    }
}

// An empty string, or what went wrong. Programs and warps take turns in their order, or backwards.
const char* run(const uint8_t* params, uint32_t x, uint32_t y, uint32_t z, int warps, uint32_t shared_bytes,
                struct Range* tensors, int tensor_count, int backwards) {
    struct Warp* warp = calloc(warps, sizeof *warp);
    ranges = tensors;
    range_count = tensor_count;
    memory_size = shared_bytes;
    memory = aligned_alloc(1024, (shared_bytes + 1024) / 1024 * 1024);
    seen = calloc(shared_bytes + 1, sizeof *seen);
    epoch = 1;
    error[0] = 0;
    for (int i = 0; i < warps; i++) {
        warp[i].stack = malloc(STACK);
        warp[i].registers = malloc(sizeof *warp->registers);
        warp[i].copy = malloc(COPIES * sizeof *warp->copy);
    }
    if (!setjmp(failed))
        for (int64_t i = 0, count = (int64_t)x * y * z; i < count; i++) {
            int64_t at = backwards ? count - 1 - i : i;
            memset(memory, 255, shared_bytes);  // nan
            for (int id = 0; id < warps; id++) {
                struct Warp* w = warp + id;
                struct Warp fresh = {.stack = w->stack, .registers = w->registers, .copy = w->copy, .params = params, .id = id,
                                     .ctaid = {at % x, at / x % y, at / x / y}, .nctaid = {x, y, z}};
                *w = fresh;
                memset(w->registers, 255, sizeof *w->registers);
                getcontext(&w->context);
                w->context.uc_stack.ss_sp = w->stack;
                w->context.uc_stack.ss_size = STACK;
                makecontext(&w->context, run_warp, 0);
            }
            run_program(warp, warps, backwards);
            epoch++;
        }
    for (int i = 0; i < warps; i++) {
        free(warp[i].stack);
        free(warp[i].registers);
        free(warp[i].copy);
    }
    free(warp);
    free(memory);
    free(seen);
    return error;
}

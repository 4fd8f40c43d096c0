/* A libcudnn for tests, by the prototypes of cuDNN 9's headers: it checks what it is handed. */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BAD = 2000, UNSUPPORTED = 3000, ADV = 0x5eed };
typedef struct { int magic, algo, type, built, input, hidden, layers; } Rnn;
typedef struct { int magic, type, layout, steps, batch, width; } Data;
typedef struct { int magic, dims[3], strides[3]; } Shape;
static char last[200];

static int fail(int status, const char *why) { strncpy(last, why, sizeof last - 1); return status; }
#define NEED(what) if (!(what)) return fail(BAD, #what)
static size_t weights(const Rnn *r) { return 2 * (8 * (size_t)r->hidden * r->hidden + 8 * r->hidden + 8); }

const char *cudnnGetErrorString(int s) { return s == UNSUPPORTED ? "NOT_SUPPORTED" : "BAD_PARAM"; }
void cudnnGetLastErrorString(char *message, size_t size) { snprintf(message, size, "(%s)", last); }
int cudnnCreate(void **h) { *h = calloc(1, 64); *(int *)*h = ADV; return 0; }
int cudnnSetStream(void *h, void *stream) { NEED(*(int *)h == ADV); return 0; }
int cudnnCreateTensorDescriptor(void **d) { *d = calloc(1, sizeof(Shape)); return 0; }
int cudnnSetTensorNdDescriptor(void *d, int type, int n, const int dims[], const int strides[]) {
    NEED(n == 3 && (type == 2 || type == 9));
    Shape *s = d; s->magic = ADV;
    memcpy(s->dims, dims, 12); memcpy(s->strides, strides, 12);
    return 0;
}
int cudnnCreateDropoutDescriptor(void **d) { *d = calloc(1, 64); return 0; }
int cudnnSetDropoutDescriptor(void *d, void *h, float p, void *states, size_t n, unsigned long long seed) {
    NEED(*(int *)h == ADV && p == 0 && !states && !n); *(int *)d = ADV; return 0;
}
int cudnnCreateRNNDescriptor(void **d) { *d = calloc(1, sizeof(Rnn)); return 0; }
int cudnnSetRNNDescriptor_v8(void *d, int algo, int cell, int bias, int dir, int mode, int type, int prec,
                             int math, int32_t input, int32_t hidden, int32_t proj, int32_t layers,
                             void *dropout, uint32_t flags) {
    NEED(cell == 2 && bias == 2 && !dir && !mode && (type == 2 || type == 9) && !prec && math <= 1);
    NEED(input == hidden && proj == hidden && layers == 1 && *(int *)dropout == ADV && flags <= 1);
    if (algo == 1 && (flags == 0 || hidden > 1024)) return fail(UNSUPPORTED, "static");
    if (algo == 3) return fail(UNSUPPORTED, "small");
    *(Rnn *)d = (Rnn){ADV, algo, type, 0, input, hidden, layers};
    return 0;
}
int cudnnBuildRNNDynamic(void *h, void *d, int batch) {
    Rnn *r = d; NEED(*(int *)h == ADV && r->algo == 2 && batch > 0); r->built = batch; return 0;
}
int cudnnCreateRNNDataDescriptor(void **d) { *d = calloc(1, sizeof(Data)); return 0; }
int cudnnSetRNNDataDescriptor(void *d, int type, int layout, int steps, int batch, int width,
                              const int lengths[], void *padding) {
    NEED(layout >= 0 && layout <= 1 && padding);
    for (int b = 0; b < batch; b++) NEED(lengths[b] == steps);
    *(Data *)d = (Data){ADV, type, layout, steps, batch, width};
    return 0;
}
int cudnnGetRNNWeightSpaceSize(void *h, void *d, size_t *n) {
    Rnn *r = d; NEED(*(int *)h == ADV && r->magic == ADV); *n = weights(r); return 0;
}
int cudnnGetRNNTempSpaceSizes(void *h, void *d, int mode, void *x, size_t *work, size_t *reserve) {
    NEED(*(int *)h == ADV && mode == 1 && ((Data *)x)->magic == ADV); *work = 48; *reserve = 80; return 0;
}
int cudnnGetRNNWeightParams(void *h, void *d, int32_t layer, size_t size, const void *space, int32_t id,
                            void *m, void **matrix, void *b, void **bias) {
    Rnn *r = d; size_t n = r->hidden;
    NEED(layer == 0 && size == weights(r) && id >= 0 && id < 8 && m && b);
    /* each algorithm has its own layout */
    size_t order = r->algo ? 7 - id : id;
    *matrix = (char *)space + 2 * (order * n * n);
    *bias = (char *)space + 2 * (8 * n * n + order * n + 8);
    return 0;
}
static int common(void *h, Rnn *r, const int32_t *lengths, Data *x, Data *y, size_t w, size_t work, size_t reserve) {
    NEED(*(int *)h == ADV && r->magic == ADV && x->magic == ADV && y == x);
    NEED(r->algo != 2 || r->built == x->batch);
    NEED(!lengths);
    NEED(x->width == r->hidden && x->type == r->type && w == weights(r) && work == 48 && reserve == 80);
    return 0;
}
static int states(Rnn *r, Data *x, Shape *s) {
    NEED(s->magic == ADV && s->dims[0] == 1 && s->dims[1] == x->batch && s->dims[2] == r->hidden);
    NEED(s->strides[0] == x->batch * r->hidden && s->strides[1] == r->hidden && s->strides[2] == 1);
    return 0;
}
static size_t bytes(Data *x) { return 2 * (size_t)x->batch * x->width; }
int cudnnRNNForward(void *h, void *d, int mode, const int32_t lengths[], void *xd, const void *x, void *yd,
                    void *y, void *hd, const void *hx, void *hy, void *cd, const void *cx, void *cy,
                    size_t w, const void *weight, size_t work, void *workspace, size_t reserve, void *kept) {
    int s = common(h, d, lengths, xd, yd, w, work, reserve);
    if (s || (s = states(d, xd, hd)) || (s = states(d, xd, cd))) return s;
    NEED(mode == 1);
    /* the first recurrent matrix's first row is added to nothing: it is the output */
    size_t n = ((Rnn *)d)->hidden, order = ((Rnn *)d)->algo ? 3 : 4;
    for (int i = 0; i < ((Data *)xd)->steps * ((Data *)xd)->batch; i++)
        memcpy((char *)y + 2 * n * i, (const char *)weight + 2 * order * n * n, 2 * n);
    memcpy(hy, hx, bytes(xd)); memcpy(cy, cx, bytes(xd));
    memset(workspace, 1, work); memset(kept, 2, reserve);
    return 0;
}
int cudnnRNNBackwardData_v8(void *h, void *d, const int32_t lengths[], void *yd, const void *y,
                            const void *dy, void *xd, void *dx, void *hd, const void *hx, const void *dhy,
                            void *dhx, void *cd, const void *cx, const void *dcy, void *dcx, size_t w,
                            const void *weight, size_t work, void *workspace, size_t reserve, void *kept) {
    int s = common(h, d, lengths, xd, yd, w, work, reserve);
    if (s || (s = states(d, xd, hd)) || (s = states(d, xd, cd))) return s;
    NEED(!*(short *)dhy && !*(short *)dcy && *(char *)kept == 2);
    memset(kept, 3, reserve);
    memcpy(dx, dy, bytes(xd) * ((Data *)xd)->steps);
    memcpy(dhx, cx, bytes(xd)); memcpy(dcx, hx, bytes(xd));
    return 0;
}
int cudnnRNNBackwardWeights_v8(void *h, void *d, int mode, const int32_t lengths[], void *xd, const void *x,
                               void *hd, const void *hx, void *yd, const void *y, size_t w, void *dweight,
                               size_t work, void *workspace, size_t reserve, void *kept) {
    int s = common(h, d, lengths, xd, yd, w, work, reserve);
    if (s || (s = states(d, xd, hd))) return s;
    NEED(mode == 0 && *(char *)kept == 3);
    return 0;
}

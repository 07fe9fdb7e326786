/* libcuda.so.1 of an H100 that runs nothing, for test_launch_path.py: Triton loads and launches its kernels through it.
 * A launch that a driver would refuse is refused. No cuda.h: what has no result worth giving takes any arguments. */
#include <stdint.h>
#include <stdio.h>

enum { OK = 0, INVALID_VALUE = 1, MOST_SHARED = 232448, SHARED_UNASKED = 49152, MOST_FUNCTIONS = 1 << 14 };

typedef struct {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
} Launch; /* how CUlaunchConfig begins */

static int functions, launches, refused, shared_asked[MOST_FUNCTIONS];

int fake_launches(void) { return launches; }
int fake_refused(void) { return refused; }

int cuLaunchKernelEx(const Launch* launch, uintptr_t function, void** arguments, void** extra) {
  unsigned threads = launch->block_x * launch->block_y * launch->block_z;
  int grid = launch->grid_x && launch->grid_x <= INT32_MAX && launch->grid_y && launch->grid_y <= 65535 &&
             launch->grid_z && launch->grid_z <= 65535;
  int shared = launch->shared <= SHARED_UNASKED || (int)launch->shared <= shared_asked[function];
  int fits = grid && shared && threads && threads <= 1024 && launch->shared <= MOST_SHARED;
  ++launches;
  refused += !fits;
  return fits ? OK : INVALID_VALUE;
}

int cuModuleGetFunction(uintptr_t* function, void* module, const char* name) {
  *function = ++functions;
  return functions < MOST_FUNCTIONS ? OK : INVALID_VALUE;
}

int cuFuncSetAttribute(uintptr_t function, int attribute, int value) {
  if (attribute != 8) return INVALID_VALUE; /* like a driver that knows MAX_DYNAMIC_SHARED_SIZE_BYTES alone */
  shared_asked[function] = value;
  return OK;
}

int cuFuncGetAttribute(int* value, int attribute, uintptr_t function) {
  *value = attribute == 0 ? 1024 : 0; /* MAX_THREADS_PER_BLOCK */
  return OK;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 97: *value = MOST_SHARED; break;        /* MAX_SHARED_MEMORY_PER_BLOCK_OPTIN */
    case 81: *value = MOST_SHARED + 1024; break; /* MAX_SHARED_MEMORY_PER_MULTIPROCESSOR */
    case 75: *value = 9; break;                  /* COMPUTE_CAPABILITY_MAJOR */
    case 76: *value = 0; break;                  /* COMPUTE_CAPABILITY_MINOR */
    case 16: *value = 132; break;                /* MULTIPROCESSOR_COUNT */
    case 12: *value = 65536; break;              /* MAX_REGISTERS_PER_BLOCK */
    case 10: *value = 32; break;                 /* WARP_SIZE */
    default: *value = 1;
  }
  return OK;
}

int cuPointerGetAttribute(uintptr_t* device_pointer, int attribute, uintptr_t pointer) {
  *device_pointer = pointer;
  return OK;
}

int cuGetErrorString(int error, const char** text) {
  *text = error == OK ? "no error" : "the fake driver refused a launch";
  return OK;
}

static int one(void** result) { /* a handle that is not null */
  *result = (void*)1;
  return OK;
}
int cuCtxGetCurrent(void** context) { return one(context); }
int cuDevicePrimaryCtxRetain(void** context, int device) { return one(context); }
int cuModuleLoadData(void** module, const void* image) { return one(module); }

static int zero(int* result) {
  *result = 0;
  return OK;
}
int cuDeviceGet(int* device, int ordinal) { return zero(device); }
int cuCtxGetDevice(int* device) { return zero(device); }
int cuStreamIsCapturing(void* stream, int* status) { return zero(status); }

#define ACCEPTED(name) \
  int name() { return OK; }
ACCEPTED(cuInit)
ACCEPTED(cuDriverGetVersion)
ACCEPTED(cuCtxSetCurrent)
ACCEPTED(cuCtxGetLimit)
ACCEPTED(cuCtxSetLimit)
ACCEPTED(cuModuleUnload)
ACCEPTED(cuFuncSetCacheConfig)
ACCEPTED(cuOccupancyMaxActiveClusters)
ACCEPTED(cuTensorMapEncodeTiled)
ACCEPTED(cuTensorMapEncodeIm2col)

// A libcuda.so.1 without a GPU: it loads nothing, runs nothing, and writes down what it is asked to launch.
//
// Like the real driver it reads as many parameters as the kernel has, of the sizes that the kernel has; `stub_layout`
// tells it both, as the compiled code states them.
#include <stdint.h>
#include <string.h>

enum { MOST_FUNCTIONS = 4096, MOST_PARAMETERS = 512, MOST_LAUNCHES = 64 };

typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned attribute_count;
} Config; // CUlaunchConfig

typedef struct {
  uint64_t function;
  unsigned grid[3], block[3], shared;
  uint64_t values[MOST_PARAMETERS];
} Launch;

static unsigned counts[MOST_FUNCTIONS], sizes[MOST_FUNCTIONS][MOST_PARAMETERS];
static unsigned functions, launches;
static Launch log_[MOST_LAUNCHES];
static char a_context;

int stub_layout(uint64_t function, unsigned count, const unsigned *bytes) {
  if (function >= MOST_FUNCTIONS || count > MOST_PARAMETERS)
    return 1;
  counts[function] = count;
  memcpy(sizes[function], bytes, count * sizeof *bytes);
  return 0;
}

unsigned stub_launches(void) { return launches; }
const Launch *stub_launch(unsigned index) { return &log_[index]; }
void stub_clear(void) { launches = 0; }

int cuLaunchKernelEx(const Config *config, void *function, void **parameters, void **extra) {
  uint64_t number = (uint64_t)function;
  if (launches == MOST_LAUNCHES || number >= MOST_FUNCTIONS || extra)
    return 1;
  Launch *launch = &log_[launches++];
  memset(launch, 0, sizeof *launch);
  launch->function = number;
  memcpy(launch->grid, config->grid, sizeof launch->grid);
  memcpy(launch->block, config->block, sizeof launch->block);
  launch->shared = config->shared;
  for (unsigned i = 0; i < counts[number]; i++)
    memcpy(&launch->values[i], parameters[i], sizes[number][i]);
  return 0;
}

int cuModuleLoadData(void **module, const void *image) { return *module = (void *)image, 0; }
int cuModuleUnload(void *module) { return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
  return *function = (void *)(uint64_t)++functions, functions >= MOST_FUNCTIONS;
}
int cuFuncGetAttribute(int *value, int attribute, void *function) {
  return *value = attribute == 0 ? 1024 : 0, 0; // CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK
}
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) { return *(uint64_t *)data = pointer, 0; }

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuGetErrorString(int error, const char **text) { return *text = "the stub refuses", 0; }
int cuDeviceGet(int *device, int index) { return *device = index, 0; }
int cuDeviceGetCount(int *count) { return *count = 1, 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
  case 75: return *value = 9, 0; // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
  case 76: return *value = 0, 0; // ..._MINOR
  case 97: return *value = 227 * 1024, 0; // CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
  default: return *value = 32, 0;
  }
}
int cuCtxGetCurrent(void **context) { return *context = &a_context, 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetDevice(int *device) { return *device = 0, 0; }
int cuCtxGetLimit(size_t *value, int limit) { return *value = 0, 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = &a_context, 0; }
int cuStreamIsCapturing(void *stream, int *status) { return *status = 0, 0; }
int cuOccupancyMaxActiveClusters(int *count, void *function, const Config *config) { return *count = 1, 0; }
int cuTensorMapEncodeTiled(void) { return 1; }
int cuTensorMapEncodeIm2col(void) { return 1; }

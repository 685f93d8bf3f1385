// A stand-in for NVIDIA's driver, and for the part of its runtime that PyTorch asks while it traces
// and compiles: one RTX 4070, which answers every question and runs nothing. pretended_card.py
// builds it twice: to be preloaded, and as libcuda.so.1.

#include <cuda_runtime_api.h>
#include <cstring>
#include <dlfcn.h>

static const size_t total_bytes = 12000000000;
static const size_t free_bytes = 11300000000;

static int succeed() { return 0; }

// A new handle of a stream or an event, which is never followed.
static void* new_handle() {
  static long count = 0;
  count += 1;
  return (void*)(count << 8);
}

extern "C" {

// ---- the driver

int cuInit(unsigned) { return 0; }

int cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}

int cuDeviceGetCount(int* count) {
  *count = 1;
  return 0;
}

int cuDeviceGet(int* device, int) {
  *device = 0;
  return 0;
}

int cuDeviceGetAttribute(int* value, int, int) {
  *value = 1;
  return 0;
}

int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  if (flags) *flags = 0;
  *active = 1;
  return 0;
}

int cuCtxGetCurrent(void** context) {
  *context = (void*)1;
  return 0;
}

int cuGetErrorString(int, const char** text) {
  *text = "none";
  return 0;
}

// Functions that are not here succeed without doing anything.
int cuGetProcAddress_v2(const char* name, void** found, int, unsigned long, int* status) {
  void* own = dlsym(RTLD_DEFAULT, name);
  *found = own ? own : (void*)succeed;
  if (status) *status = 0;
  return 0;
}

int cuGetProcAddress(const char* name, void** found, int version, unsigned long flags) {
  return cuGetProcAddress_v2(name, found, version, flags, nullptr);
}

// ---- the runtime

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  if (status) *status = (cudaDriverEntryPointQueryResult)0;
  return (cudaError_t)cuGetProcAddress_v2(name, found, 0, 0, nullptr);
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int) { return cudaSuccess; }

cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 0;
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = free_bytes;
  *total = total_bytes;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  memset(properties, 0, sizeof *properties);
  strcpy(properties->name, "NVIDIA GeForce RTX 4070");
  properties->major = 8;
  properties->minor = 9;
  properties->totalGlobalMem = total_bytes;
  properties->multiProcessorCount = 46;
  properties->warpSize = 32;
  properties->maxThreadsPerMultiProcessor = 1536;
  properties->maxThreadsPerBlock = 1024;
  properties->regsPerMultiprocessor = 65536;
  properties->regsPerBlock = 65536;
  properties->sharedMemPerBlock = 49152;
  properties->sharedMemPerBlockOptin = 101376;
  properties->sharedMemPerMultiprocessor = 102400;
  properties->l2CacheSize = 36 << 20;
  for (int i = 0; i < 3; i++) {
    properties->maxThreadsDim[i] = 1024;
    properties->maxGridSize[i] = 1 << 30;
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  *stream = (cudaStream_t)new_handle();
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = (cudaEvent_t)new_handle();
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }

cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }

cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }

cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }

}  // extern "C"

// ---- PyTorch's own functions above the runtime; their names are C++'s

namespace c10::cuda {

signed char device_count() noexcept { return 1; }
signed char device_count_ensure_non_zero() { return 1; }
signed char current_device() { return 0; }
void set_device(signed char, bool) {}
void SetTargetDevice() {}
bool hasPrimaryContext(signed char) { return false; }

int GetDeviceCount(int* count) {
  *count = 1;
  return 0;
}

int GetDevice(signed char* device) {
  *device = 0;
  return 0;
}

int SetDevice(signed char, bool) { return 0; }
int MaybeSetDevice(signed char) { return 0; }

}  // namespace c10::cuda

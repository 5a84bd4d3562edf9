/* The parts of CUDA's runtime that torch calls, for a device whose memory is the host's.

   Fresh memory is filled with NaN, so that whatever is read before it is written shows. Work is done at
   once, so that streams and events have nothing to wait for; a kernel of CUDA's own ends the process. */

#include <driver_types.h>
#include <malloc.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { success = 0, out_of_memory = 2, no_device = 100 };

static const size_t total_bytes = (size_t)80 << 30;
static size_t used_bytes = (size_t)2 << 30;
static int current_device = 0;

/* --- devices --- */

int cudaGetDeviceCount(int *count) {
  const char *wanted = getenv("STAND_IN_DEVICES"), *visible = getenv("CUDA_VISIBLE_DEVICES");
  *count = visible && !*visible ? 0 : wanted ? atoi(wanted) : 1;
  return *count ? success : no_device;
}
int cudaGetDevice(int *device) { *device = current_device; return success; }
int cudaSetDevice(int device) { current_device = device; return success; }
int cudaDeviceCanAccessPeer(int *can) { *can = 0; return success; }
int cudaDeviceGetAttribute(int *value) { *value = 1; return success; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return success;
}
int cudaDriverGetVersion(int *version) { *version = 13000; return success; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return success; }
int cuDevicePrimaryCtxGetState(int device, int *flags, int *active) { *active = 1; return success; }

int cudaGetDeviceProperties(struct cudaDeviceProp *found) {
  memset(found, 0, sizeof *found);
  strcpy(found->name, "host memory");
  found->totalGlobalMem = total_bytes;
  found->sharedMemPerBlock = 48 << 10;
  found->sharedMemPerMultiprocessor = 228 << 10;
  found->regsPerBlock = found->regsPerMultiprocessor = 64 << 10;
  found->warpSize = 32;
  found->maxThreadsPerBlock = 1024;
  found->maxThreadsPerMultiProcessor = 2048;
  found->major = 9;
  found->multiProcessorCount = 132;
  found->l2CacheSize = 50 << 20;
  return success;
}
int cudaGetDeviceProperties_v2(struct cudaDeviceProp *found) { return cudaGetDeviceProperties(found); }

/* --- memory --- */

int cudaMalloc(void **made, size_t size) {
  if (posix_memalign(made, 512, size)) return out_of_memory;
  memset(*made, 0xff, size);
  used_bytes += malloc_usable_size(*made);
  return success;
}
int cudaFree(void *given) {
  used_bytes -= malloc_usable_size(given);
  free(given);
  return success;
}
int cudaHostAlloc(void **made, size_t size) {
  return posix_memalign(made, 512, size) ? out_of_memory : success;
}
int cudaFreeHost(void *given) { free(given); return success; }
int cudaMemGetInfo(size_t *available, size_t *total) {
  *total = total_bytes;
  *available = total_bytes - used_bytes;
  return success;
}
int cudaMemcpy(void *to, const void *from, size_t size) { memmove(to, from, size); return success; }
int cudaMemcpyAsync(void *to, const void *from, size_t size) { memmove(to, from, size); return success; }
int cudaMemsetAsync(void *to, int value, size_t size) { memset(to, value, size); return success; }
int cudaPointerGetAttributes(void *attributes) { memset(attributes, 0, 24); return success; }

/* --- streams and events: handles that nothing stands behind --- */

static int make_handle(size_t *handle) {
  static size_t last = 16;
  *handle = last += 16;
  return success;
}
int cudaStreamCreateWithFlags(size_t *stream) { return make_handle(stream); }
int cudaStreamCreateWithPriority(size_t *stream) { return make_handle(stream); }
int cudaEventCreate(size_t *event) { return make_handle(event); }
int cudaEventCreateWithFlags(size_t *event) { return make_handle(event); }
int cudaEventElapsedTime(float *milliseconds) { *milliseconds = 1; return success; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return success; }
int cudaStreamGetCaptureInfo(void *stream, int *status) { *status = 0; return success; }

#define NOTHING_TO_DO(name) int name(void) { return success; }
NOTHING_TO_DO(cudaDeviceSynchronize)
NOTHING_TO_DO(cudaEventDestroy)
NOTHING_TO_DO(cudaEventQuery)
NOTHING_TO_DO(cudaEventRecord)
NOTHING_TO_DO(cudaEventRecordWithFlags)
NOTHING_TO_DO(cudaEventSynchronize)
NOTHING_TO_DO(cudaGetLastError)
NOTHING_TO_DO(cudaPeekAtLastError)
NOTHING_TO_DO(cudaStreamQuery)
NOTHING_TO_DO(cudaStreamSynchronize)
NOTHING_TO_DO(cudaStreamWaitEvent)
NOTHING_TO_DO(cudaThreadExchangeStreamCaptureMode)

/* --- kernels: there is nothing to run them --- */

static int refuse_kernel(void) {
  fputs("cuda_stand_in: torch launched a CUDA kernel that no operator of the stand-in covers\n", stderr);
  abort();
}
int cudaLaunchKernel(void) { return refuse_kernel(); }
int cudaLaunchKernelExC(void) { return refuse_kernel(); }

// One bug for each tool of compute-sanitizer: `planted memcheck` and so on. A checker that finds nothing here checks nothing.
#include <cstdio>
#include <cstring>

namespace {
constexpr int kThreads = 64;

// memcheck: one element past the end.
__global__ void beyond(int* out) { out[threadIdx.x + 1] = 1; }

// racecheck: a neighbour's value is read without a barrier after it is written.
__global__ void race(int* out) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = values[(threadIdx.x + 32) % kThreads];
}

// initcheck: `in` was never written.
__global__ void unwritten(const int* in, int* out) { out[threadIdx.x] = in[threadIdx.x] + 1; }

// synccheck: a barrier that only part of a warp reaches.
__global__ void divergent(int* out) {
  if (threadIdx.x < 16) __syncthreads();
  out[threadIdx.x] = 1;
}
}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  int *in = nullptr, *out = nullptr;
  if (cudaMalloc(&in, kThreads * sizeof(int)) != cudaSuccess || cudaMalloc(&out, kThreads * sizeof(int)) != cudaSuccess) return 3;
  if (!std::strcmp(argv[1], "memcheck")) beyond<<<1, kThreads>>>(out);
  else if (!std::strcmp(argv[1], "racecheck")) race<<<1, kThreads>>>(out);
  else if (!std::strcmp(argv[1], "initcheck")) unwritten<<<1, kThreads>>>(in, out);
  else if (!std::strcmp(argv[1], "synccheck")) divergent<<<1, kThreads>>>(out);
  else return 2;
  std::printf("%s: %s\n", argv[1], cudaGetErrorString(cudaDeviceSynchronize()));
  cudaFree(in);
  cudaFree(out);
  return 0;
}

// The cases on the first GPU, through the CUDA runtime. Compiled where CMake finds a CUDA toolkit.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <utility>

#include "run.h"

namespace {

void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}

class CudaMemory final : public Memory {
 public:
  ~CudaMemory() override {
    for (void* piece : pieces_) cudaFree(piece);
  }
  nsa::Device device() const override { return nsa::Device::kCuda; }
  void* allocate(std::size_t bytes) override {
    void* piece = nullptr;
    require(cudaMalloc(&piece, bytes + 1), "cudaMalloc");
    pieces_.push_back(piece);
    return piece;
  }
  void copy_in(void* to, const void* from, std::size_t bytes) override {
    require(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "copy to the GPU");
  }
  void copy_out(void* to, const void* from, std::size_t bytes) override {
    require(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "copy from the GPU");
  }

 private:
  std::vector<void*> pieces_;
};

}  // namespace

bool has_gpu() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

void check_cuda(Tally& tally) {
  for (const nsa::Dtype dtype : {nsa::Dtype::kBFloat16, nsa::Dtype::kFloat16}) {
    for (const auto& [head_dim_qk, head_dim_v] : {std::pair{64, 64}, {128, 128}, {192, 128}, {256, 256}}) {
      for (const Case& test : make_cases(head_dim_qk, head_dim_v)) {
        CudaMemory memory;
        run_case(test, dtype, memory, tally);
      }
    }
  }
}

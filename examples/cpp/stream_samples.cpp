// Streams a file of samples through an exported network, step by step, without Python, and prints each output.
//
//     stream_samples EXTENSION FOLDER SAMPLES
//
// EXTENSION is mru_kernels/_C*.so, which defines the ops. package.py writes start.pt2 and next.pt2 into FOLDER.
// SAMPLES is a text file with one sample a line, its numbers separated by spaces.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/types.h>

#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

int main(int count, char** arguments) {
  if (count != 4) return std::cerr << "usage: stream_samples EXTENSION FOLDER SAMPLES\n", 2;
  if (!dlopen(arguments[1], RTLD_NOW)) return std::cerr << dlerror() << "\n", 1;
  const c10::InferenceMode no_gradients;
  const std::string folder = arguments[2];
  torch::inductor::AOTIModelPackageLoader start(folder + "/start.pt2"), next(folder + "/next.pt2");

  std::vector<torch::Tensor> results;  // the output of the last step, then the tensors of the state
  std::ifstream samples(arguments[3]);
  for (std::string line; std::getline(samples, line);) {
    std::istringstream words(line);
    const std::vector<float> sample{std::istream_iterator<float>(words), {}};
    std::vector<torch::Tensor> inputs = results;
    if (inputs.empty()) inputs.emplace_back();
    inputs[0] = torch::tensor(sample).unsqueeze(0);
    results = results.empty() ? start.run(inputs) : next.run(inputs);
    const auto output = results[0].contiguous();
    for (int64_t i = 0; i < output.numel(); ++i) std::printf("%.9g ", output.data_ptr<float>()[i]);
    std::puts("");
  }
}

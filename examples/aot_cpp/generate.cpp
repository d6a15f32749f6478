// Text from a package of kvarn_ops.export.aot_compile, without Python (README.md in this folder):
//
//     generate PACKAGE TOKENS PROMPT... [--chunk N]
//
// Every prompt starts a sequence of its own. Tokens are bytes, as in examples/byte_model.

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <charconv>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

constexpr int64_t opens_file = 256;  // the byte model's token before a file

[[noreturn]] void refuse(const std::string& sentence) { throw std::runtime_error(sentence); }

int64_t positive(const std::string& text, const std::string& name) {
  int64_t number = 0;
  const char* end = text.data() + text.size();
  const auto read = std::from_chars(text.data(), end, number);
  if (read.ec != std::errc() || read.ptr != end || number < 1)
    refuse(name + " '" + text + "': give a whole number from 1.");
  return number;
}

struct Step {
  torch::inductor::AOTIModelPackageLoader loader;
  int64_t chunk, max_cache_len;
  std::vector<at::Tensor> state;  // what calls change: the loader's own memory, not copies

  explicit Step(const std::string& path) : loader(path) {
    auto about = loader.get_metadata();
    if (about["kvarn_ops.batch_size"] != "1")
      refuse(path + " is no package that aot_compile made with batch_size=1.");
    chunk = std::stoll(about["kvarn_ops.chunk"]);
    max_cache_len = std::stoll(about["kvarn_ops.max_cache_len"]);
    for (const auto& [name, tensor] : loader.get_runner()->extract_constants_map(false))
      if (name.starts_with("past_")) state.push_back(tensor);
  }

  // The most probable token after new ones.
  int64_t operator()(const std::vector<int64_t>& ids) {
    at::Tensor logits;  // [1, S, vocabulary]
    for (const auto& part : at::tensor(ids, at::kLong).unsqueeze(0).split(chunk, 1))
      logits = loader.run({part.contiguous()})[0];
    return logits.select(1, -1).argmax().item<int64_t>();
  }

  void reset() {
    for (auto& tensor : state) tensor.zero_();
  }

  double megabytes() const {
    size_t bytes = 0;
    for (const auto& tensor : state) bytes += tensor.nbytes();
    return bytes / 1e6;
  }
};

void generate(Step& step, const std::string& prompt, int64_t count) {
  std::vector<int64_t> ids{opens_file};
  for (const unsigned char byte : prompt) ids.push_back(byte);
  if (std::ssize(ids) > step.max_cache_len - count)
    refuse("the package holds " + std::to_string(step.max_cache_len) + " tokens, the prompt has " +
           std::to_string(ids.size()) + ": give a smaller TOKENS.");
  step.reset();
  const auto start = std::chrono::steady_clock::now();
  std::string text;
  for (int64_t made = 0; made < count; ++made) {
    ids = {step(ids)};
    if (ids[0] < 256) text += static_cast<char>(ids[0]);
  }
  const std::chrono::duration<double, std::milli> passed = std::chrono::steady_clock::now() - start;
  std::cout << text << '\n';
  std::printf("[%lld tokens, %.2f ms each, cache %.2f MB]\n", static_cast<long long>(count),
              passed.count() / count, step.megabytes());
}

int main(int argc, char** argv) try {
  std::vector<std::string> words(argv + 1, argv + argc);
  int64_t chunk = 0;
  if (words.size() > 1 && words[words.size() - 2] == "--chunk") {
    chunk = positive(words.back(), "--chunk");
    words.resize(words.size() - 2);
  }
  if (words.size() < 3) refuse("usage: generate PACKAGE TOKENS PROMPT... [--chunk N]");
  const int64_t count = positive(words[1], "TOKENS");
  if (!std::filesystem::is_regular_file(words[0])) refuse(words[0] + " is no file.");
  const c10::InferenceMode no_autograd;
  Step step(words[0]);
  if (chunk > step.chunk)
    refuse("--chunk: the package takes at most " + std::to_string(step.chunk) + " tokens at once.");
  if (chunk) step.chunk = chunk;
  for (size_t index = 2; index < words.size(); ++index) generate(step, words[index], count);
} catch (const std::exception& error) {
  const std::string text = error.what();
  std::cerr << "generate: " << text.substr(0, text.find('\n')) << '\n';
  return 1;
}

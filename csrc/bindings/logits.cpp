// Bindings of the logits family: raw addresses, sizes and strides, checked by rainkernels/ops/logits.py.
#include "cpu/logits.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/logits_draws.h"

namespace py = pybind11;
using rainkernels::Dtype;
using address = std::uintptr_t;

namespace {

template <class T>
T* at(address a) {
  return reinterpret_cast<T*>(a);
}

// `models`: address and row stride of each model in turn. Returns the broken rule, 0 for none, and its row.
py::tuple mix_sample(const py::tuple& models, int dtype, int rows, int vocab, address weights, address temperature,
                     address top_k, address top_p, address min_p, address plausibility, int plausibility_model,
                     int order, address seed, address position, int position_words, address bias, int64_t bias_stride,
                     address token, address prob, address logprob, const py::tuple& stats, int threads) {
  rainkernels::MixParams p{};
  p.num_models = static_cast<int>(models.size() / 2);
  for (int i = 0; i < p.num_models && i < rainkernels::kMaxModels; ++i) {
    p.logits[i] = at<const void>(models[2 * i].cast<address>());
    p.row_stride[i] = models[2 * i + 1].cast<int64_t>();
  }
  p.dtype = static_cast<Dtype>(dtype);
  p.rows = rows;
  p.vocab = vocab;
  p.weights = at<const float>(weights);
  p.temperature = at<const float>(temperature);
  p.top_k = at<const int32_t>(top_k);
  p.top_p = at<const float>(top_p);
  p.min_p = at<const float>(min_p);
  p.plausibility = at<const float>(plausibility);
  p.plausibility_model = plausibility_model;
  p.order = static_cast<rainkernels::FilterOrder>(order);
  p.seed = at<const int64_t>(seed);
  p.position = at<const int64_t>(position);
  p.position_words = position_words;
  p.bias = at<const float>(bias);
  p.bias_stride = bias_stride;
  p.token = at<int32_t>(token);
  p.prob = at<float>(prob);
  p.logprob = at<float>(logprob);
  float** const fields[] = {&p.logprob_models, &p.lse_mix, &p.lse_models, &p.log_z, &p.entropy, &p.kl_mix, &p.kl_ref};
  for (size_t i = 0; i < stats.size() && i < 7; ++i) *fields[i] = at<float>(stats[i].cast<address>());
  p.num_threads = threads;
  rainkernels::MixFault fault{};
  {
    py::gil_scoped_release release;
    fault = rainkernels::mix_sample(p);
  }
  return py::make_tuple(static_cast<int>(fault.rule), fault.row);
}

// Numbers of draws; every draw is 24 bytes of `names`: key, and low and high half of the counter, in the machine's
// order.
std::vector<double> philox_uniforms(const std::string& names) {
  std::vector<double> numbers(names.size() / 24);
  for (size_t i = 0; i < numbers.size(); ++i) {
    uint64_t words[3];
    std::memcpy(words, names.data() + 24 * i, 24);
    numbers[i] = rainkernels::philox_uniform(words[0], words[1], words[2]);
  }
  return numbers;
}

// rows: a contiguous float32 vector per request; the others one number per request, uniform NaN for none.
// Returns tuples of token, prob, logprob.
py::list draw_rows(const py::list& rows, const std::vector<double>& temperature, const std::vector<int64_t>& top_k,
                   const std::vector<double>& uniform, const std::vector<bool>& logprob, int threads) {
  const size_t n = rows.size();
  if (temperature.size() != n || top_k.size() != n || uniform.size() != n || logprob.size() != n)
    throw std::invalid_argument("draw_rows: expected one temperature, top_k, uniform and logprob per row");
  std::vector<rainkernels::DrawRequest> requests;
  requests.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    const auto row = py::reinterpret_borrow<py::array_t<float, py::array::c_style>>(rows[i]);
    requests.push_back({row.data(), row.size(), temperature[i], top_k[i], uniform[i], logprob[i]});
  }
  std::vector<rainkernels::DrawResult> results;
  {
    py::gil_scoped_release release;
    results = rainkernels::draw_rows(requests, threads);
  }
  py::list out(n);
  for (size_t i = 0; i < n; ++i) out[i] = py::make_tuple(results[i].token, results[i].prob, results[i].logprob);
  return out;
}

}  // namespace

void bind_logits(py::module_& m) {
  m.def("philox_uniforms", [](const py::bytes& names) { return philox_uniforms(names); });
  m.def("draw_rows", &draw_rows);
  m.def("mix_sample_cpu", &mix_sample);
  m.def("rank_cpu", [](address base, int64_t base_stride, address aligned, int64_t aligned_stride, int dtype, int rows,
                       int vocab, address token, int token_bytes, address rank, address kl, address logprob_base,
                       address logprob_aligned, int threads) {
    const rainkernels::RankParams p{at<const void>(base),
                                    at<const void>(aligned),
                                    base_stride,
                                    aligned_stride,
                                    static_cast<Dtype>(dtype),
                                    rows,
                                    vocab,
                                    at<const void>(token),
                                    token_bytes,
                                    at<int32_t>(rank),
                                    at<float>(kl),
                                    at<float>(logprob_base),
                                    at<float>(logprob_aligned),
                                    threads};
    py::gil_scoped_release release;
    rainkernels::rank_tokens(p);
  });
}

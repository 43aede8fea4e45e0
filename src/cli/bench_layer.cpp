#include "cli/bench_layer.h"

#include <set>

#include "core/gpu.h"

namespace entrain::cli {

Tensor heads(Tensor x, int64_t first, int64_t count, int64_t width) {
  return x.slice(2, first, count * width).split(2, width).transpose(1, 2);
}

LayerInputs::LayerInputs(const AttentionSizes& s, const TopicInputs& rows, Device device,
                         DType dtype)
    : sizes(s), memory_(device) {
  for (const bool committed : {false, true}) {
    if (committed) memory_.commit();
    qkv_ = memory_.alloc({s.B, s.N, (s.Hq + 2 * s.Hkv) * s.D}, dtype);
    dout_ = memory_.alloc({s.B, s.N, s.Hq * s.D}, dtype);
  }
  Mirror qkv(qkv_), dout(dout_);
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < s.B * s.N; ++i) {
    const int64_t b = i / s.N, token = i % s.N;
    float* to = qkv.host().ptr<float>() + i * qkv_[2];
    for (int64_t h = 0; h < s.Hq; ++h, to += s.D) rows.query(b, h, token, to);
    for (int64_t r = 0; r < s.Hkv; ++r, to += s.D) rows.key(b, r, token, to);
    for (int64_t r = 0; r < s.Hkv; ++r, to += s.D) rows.noise(0, b, r, token, to);
    to = dout.host().ptr<float>() + i * dout_[2];
    for (int64_t h = 0; h < s.Hq; ++h, to += s.D) rows.noise(1, b, h, token, to);
  }
  qkv.upload();
  dout.upload();
}

Tensor LayerInputs::q_of(Tensor qkv) const {
  return heads(qkv, 0, sizes.Hq, sizes.D);
}
Tensor LayerInputs::k_of(Tensor qkv) const {
  return heads(qkv, sizes.Hq * sizes.D, sizes.Hkv, sizes.D);
}
Tensor LayerInputs::v_of(Tensor qkv) const {
  return heads(qkv, (sizes.Hq + sizes.Hkv) * sizes.D, sizes.Hkv, sizes.D);
}

Layer::Layer(std::unique_ptr<AttentionMethod> method, const LayerInputs& in)
    : method_(std::move(method)), memory_(in.device()) {
  for (const bool committed : {false, true}) {
    if (committed) memory_.commit();
    memory_.rewind();
    tape_ = std::make_unique<Tape>(memory_, Tape::Options{.dtype = in.dtype(), .training = true});
    record(in);
  }
  tape_->time_ops("");
}

void Layer::record(const LayerInputs& in) {
  const auto [B, Hq, Hkv, D, N] = in.sizes;
  const HeadShape shape{Hq, Hkv, D};
  const Tensor grad = tape_->keep(in.packed()), read = tape_->keep({Hkv, read_fields}, DType::f64);
  AttentionInput input{.q = {in.q(), in.q_of(grad)},
                       .k = {in.k(), in.k_of(grad)},
                       .v = {in.v(), in.v_of(grad)},
                       .projected = {},
                       .params = {},
                       .read = read};
  // A method's own projections as beside a dense model: copies of k and v, and gates near 0.5.
  for (const Projection& x : method_->projections(shape)) {
    const Shape rows{B, N, x.heads * x.width};
    const auto zeros = [&] { return heads(tape_->keep(rows), 0, x.heads, x.width); };
    const std::string& like = x.adopt.like;
    const Tensor value = like == "k_proj.weight"   ? in.k()
                         : like == "v_proj.weight" ? in.v()
                                                   : zeros();
    input.projected.push_back({value, zeros()});
  }
  for (const ParamSpec& spec : method_->params(shape)) {
    const DType sums = tape_->sum_dtype(), matrices = tape_->dtype();
    input.params.push_back({tape_->keep(spec.shape, spec.shape.rank == 1 ? sums : matrices),
                            tape_->keep(spec.shape, sums)});
  }
  const Tensor o = tape_->keep(in.dout().shape);
  mask_ = method_->record(*tape_, input, {heads(o, 0, Hq, D), heads(in.dout(), 0, Hq, D)});
  counters_ = ReadCounters(read);
}

void Layer::seek(double density) {
  cli::seek(method_->gamma(), density, [&] { return read().density(); });
}

ReadCounters::Read Layer::read() {
  return counters_.during([&] { tape_->forward(); });
}

Layer::Times Layer::run() {
  const auto passes = [&] {
    tape_->forward();
    tape_->backward();
  };
  if (tape_->device() == Device::cpu) {
    passes();
  } else {
    if (!graph_) {
      passes();  // makes what is made once
      graph_.emplace().capture(passes);
    }
    graph_->launch();
    gpu::synchronize();
  }
  // NSA attends in three branches.
  static const std::set<std::string> attends{"attention", "compressed", "selected", "window"};
  Times times;
  for (const auto& [op, time] : tape_->times()) {
    OpTime& sum = attends.contains(op) ? times.attention : times.routing;
    sum.forward += time.forward;
    sum.backward += time.backward;
  }
  return times;
}

}  // namespace entrain::cli

#include "cli/bench_step.h"

#include "core/mirror.h"
#include "core/rng.h"
#include "train/device.h"

namespace entrain::cli {

Step::Step(const TrainShape& s, Comm& comm)
    : comm_(comm),
      decoder_(s.model, s.attention, s.tokens, 1, true, comm.device(),
               choose_dtype("auto", comm.device()),
               s.shard_optimizer ? Shard{comm.rank(), comm.size()} : Shard{}),
      optimizer_(decoder_.params(), {}),
      memory_(comm.device()),
      sums_(comm),
      update_time_(comm.device()),
      gather_time_(comm.device()),
      counters_(decoder_.read()) {
  record(s);
  memory_.commit();
  record(s);
  draw_tokens();
}

void Step::record(const TrainShape& s) {
  memory_.rewind();
  tape_ = std::make_unique<Tape>(
      memory_,
      Tape::Options{.dtype = decoder_.dtype(), .training = true, .recompute = s.recompute});
  tokens_ = tape_->keep({s.batch, s.tokens}, DType::i32);
  targets_ = tape_->keep({s.batch, s.tokens}, DType::i32);
  const double all = static_cast<double>(tokens_.numel()) * comm_.size();
  decoder_.loss(*tape_, tokens_, targets_, 1 / all, [this](Tensor grads) { sums_.add(grads); });
}

void Step::draw_tokens() {
  Rng rng(1, static_cast<uint64_t>(comm_.rank()));
  for (const Tensor& t : {tokens_, targets_}) {
    Mirror ids(t);
    for (int64_t i = 0; i < t.numel(); ++i) {
      ids.host().ptr<int32_t>()[i] =
          static_cast<int32_t>(rng.below(static_cast<uint64_t>(decoder_.config().vocab)));
    }
    ids.upload();
  }
}

void Step::work() {
  tape_->forward();
  tape_->backward();
  sums_.wait();
  update_time_.reset();
  update_time_.start();
  optimizer_.update();
  update_time_.stop();
  Params& params = decoder_.params();
  if (params.shard().count == 1) return;
  gather_time_.reset();
  gather_time_.start();
  comm_.gather(params.shards());
  gather_time_.stop();
  params.round();
}

void Step::run() {
  optimizer_.prepare(++count_, 1e-4);
  if (decoder_.device() == Device::cpu) return work();
  if (count_ == 1) {
    work();  // makes what is made once
  } else {
    if (!graph_) graph_.emplace().capture([this] { work(); });
    graph_->launch();
  }
  gpu::synchronize();
}

void Step::time_parts() {
  tape_->time_ops("");
  graph_.reset();
}

void Step::seek_density(double target) {
  seek(gamma(), target, [&] {
    const ReadCounters::Read own = counters_.during([&] { tape_->forward(); });
    double sums[] = {own.pairs, own.causal};
    comm_.sum(sums, 2);
    return sums[0] / sums[1];
  });
}

}  // namespace entrain::cli

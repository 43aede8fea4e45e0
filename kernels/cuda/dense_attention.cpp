// Plain causal attention in bf16 by cuDNN's fused kernels (FlashAttention, arXiv 2205.14135 and
// 2307.08691), through cuDNN's C interface.
//
// cuDNN is given a graph of elementary operations and recognises attention in it. What the graph
// calls intermediate stays in the kernels' registers and shared memory. The graphs:
//
//   forward   S = scale Q K^T, -inf above the diagonal     backward   delta = sum_d dO O
//             m = max_j S, E = exp(S - m)                             P = exp(S - lse)
//             l = sum_j E, lse = m + log l                            dV = P^T dO
//             O = (E / l) V                                           dS = scale P (dO V^T - delta)
//                                                                     dK = dS^T Q, dQ = dS K
//
// dK and dV come out for every query head and are then summed over the heads of a group.
//
// Deterministic gradients have a price. cuDNN's fastest backward adds to dQ with atomics, in any
// order; a graph asks for it by putting an f32 buffer between dS K and dQ. Without that buffer, as
// here, cuDNN writes dS to memory, 2 bytes for each (query, key, head), and a second kernel
// multiplies it with K in a fixed order. To bound that memory, backward takes the problem in
// slices: some sequences with all their heads, or some groups of heads of one sequence.
//
// A plan is the choice of kernels for one graph and depends on all sizes and strides. To make it
// takes up to seconds, so it is made once, when the problem is first asked about.
#include <cudnn.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/attention.cuh"

namespace entrain::cuda {
namespace {

// ---- How cuDNN is told things -------------------------------------------------------------------

/// cuDNN said no.
struct Refusal {
  std::string why;
};

void accept(cudnnStatus_t status, const char* what) {
  if (status == CUDNN_STATUS_SUCCESS) return;
  char detail[512] = "";
  cudnnGetLastErrorString(detail, sizeof(detail));
  throw Refusal{std::string("cuDNN, ") + what + ": " + cudnnGetErrorString(status) + " " + detail};
}

// The interface is untyped; these are its names for types.
constexpr auto type_name(const int64_t*) {
  return CUDNN_TYPE_INT64;
}
constexpr auto type_name(const bool*) {
  return CUDNN_TYPE_BOOLEAN;
}
constexpr auto type_name(const cudnnHandle_t*) {
  return CUDNN_TYPE_HANDLE;
}
constexpr auto type_name(const cudnnDataType_t*) {
  return CUDNN_TYPE_DATA_TYPE;
}
constexpr auto type_name(const cudnnBackendHeurMode_t*) {
  return CUDNN_TYPE_HEUR_MODE;
}
constexpr auto type_name(const cudnnPointwiseMode_t*) {
  return CUDNN_TYPE_POINTWISE_MODE;
}
constexpr auto type_name(const cudnnReduceTensorOp_t*) {
  return CUDNN_TYPE_REDUCTION_OPERATOR_TYPE;
}
constexpr auto type_name(const cudnnBackendDescriptor_t*) {
  return CUDNN_TYPE_BACKEND_DESCRIPTOR;
}

/// A thing of cuDNN's: a tensor, an operation, a graph, a plan. Attributes, then finalize().
class Descriptor {
 public:
  explicit Descriptor(cudnnBackendDescriptorType_t type) {
    accept(cudnnBackendCreateDescriptor(type, &raw_), "descriptor");
  }
  Descriptor(Descriptor&& other) noexcept : raw_(std::exchange(other.raw_, nullptr)) {}
  ~Descriptor() {
    if (raw_) cudnnBackendDestroyDescriptor(raw_);
  }
  cudnnBackendDescriptor_t raw() const { return raw_; }

  template <class T>
  Descriptor& set(cudnnBackendAttributeName_t name, const T& value) {
    return set(name, type_name(&value), 1, &value);
  }
  template <class Values>
  Descriptor& set_all(cudnnBackendAttributeName_t name, const Values& values) {
    return set(name, type_name(values.data()), static_cast<int64_t>(values.size()), values.data());
  }
  Descriptor& set(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t count,
                  const void* values) {
    accept(cudnnBackendSetAttribute(raw_, name, type, count, values), "attribute");
    return *this;
  }
  Descriptor& finalize(const char* what) {
    accept(cudnnBackendFinalize(raw_), what);
    return *this;
  }

 private:
  cudnnBackendDescriptor_t raw_ = nullptr;
};

cudnnHandle_t handle() {
  static const cudnnHandle_t made = [] {
    cudnnHandle_t handle;
    accept(cudnnCreate(&handle), "start");
    accept(cudnnSetStream(handle, stream()), "stream");
    return handle;
  }();
  return made;
}

// ---- Graphs -------------------------------------------------------------------------------------

using Extents = std::array<int64_t, 4>;

struct Layout {
  Extents extent, stride;

  auto operator<=>(const Layout&) const = default;
  Layout transposed() const {
    Layout t = *this;
    std::swap(t.extent[2], t.extent[3]);
    std::swap(t.stride[2], t.stride[3]);
    return t;
  }
};

Layout packed(int64_t b, int64_t h, int64_t n, int64_t d) {
  return {{b, h, n, d}, {h * n * d, n * d, d, 1}};
}

/// The numbers by which cuDNN knows tensors.
enum Uid : int64_t {
  uid_q,  // of the problem: these have places in a Key
  uid_k,
  uid_v,
  uid_o,
  uid_lse,
  uid_dout,
  uid_dq,
  uid_dk,
  uid_dv,
  uid_delta,  // in scratch
  uid_scale,  // on the host
  uid_minus_infinity,
  uid_one,
  uid_intermediate  // this and all above
};

/// The tensors of a graph: q k v o lse, for backward also dout dq dk dv.
using Key = std::vector<Layout>;

/// A tensor within a graph.
struct Node {
  cudnnBackendDescriptor_t raw;
  Layout layout;
};

/// Operations in the order in which they are called, each of which returns its result.
class Graph {
 public:
  Node tensor(int64_t uid, const Layout& layout, cudnnDataType_t type = CUDNN_DATA_BFLOAT16) {
    return add_tensor(uid, layout, type, false, false);
  }
  Node scalar(int64_t uid) {
    return add_tensor(uid, packed(1, 1, 1, 1), CUDNN_DATA_FLOAT, false, true);
  }
  Node intermediate(const Layout& layout, cudnnDataType_t type = CUDNN_DATA_FLOAT) {
    return add_tensor(uid_intermediate + intermediates_++, layout, type, true, false);
  }

  Node matmul(Node a, Node b, Node c) {
    const auto how = keep(Descriptor(CUDNN_BACKEND_MATMUL_DESCRIPTOR)
                              .set(CUDNN_ATTR_MATMUL_COMP_TYPE, CUDNN_DATA_FLOAT)
                              .finalize("matmul"));
    add(Descriptor(CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR)
            .set(CUDNN_ATTR_OPERATION_MATMUL_ADESC, a.raw)
            .set(CUDNN_ATTR_OPERATION_MATMUL_BDESC, b.raw)
            .set(CUDNN_ATTR_OPERATION_MATMUL_CDESC, c.raw)
            .set(CUDNN_ATTR_OPERATION_MATMUL_DESC, how)
            .finalize("matmul"));
    return c;
  }
  /// Over every dimension in which y has extent 1, or over heads of a group.
  Node reduce(cudnnReduceTensorOp_t op, Node x, Node y) {
    const auto how = keep(Descriptor(CUDNN_BACKEND_REDUCTION_DESCRIPTOR)
                              .set(CUDNN_ATTR_REDUCTION_COMP_TYPE, CUDNN_DATA_FLOAT)
                              .set(CUDNN_ATTR_REDUCTION_OPERATOR, op)
                              .finalize("reduction"));
    add(Descriptor(CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR)
            .set(CUDNN_ATTR_OPERATION_REDUCTION_XDESC, x.raw)
            .set(CUDNN_ATTR_OPERATION_REDUCTION_YDESC, y.raw)
            .set(CUDNN_ATTR_OPERATION_REDUCTION_DESC, how)
            .finalize("reduction"));
    return y;
  }
  /// The same elements under another layout.
  Node reshape(Node x, Node y) {
    add(Descriptor(CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR)
            .set(CUDNN_ATTR_OPERATION_RESHAPE_XDESC, x.raw)
            .set(CUDNN_ATTR_OPERATION_RESHAPE_YDESC, y.raw)
            .finalize("reshape"));
    return y;
  }
  Node unary(cudnnPointwiseMode_t mode, Node x, Node y) {
    pointwise(mode, CUDNN_DATA_FLOAT, {{CUDNN_ATTR_OPERATION_POINTWISE_XDESC, x}}, y);
    return y;
  }
  Node unary(cudnnPointwiseMode_t mode, Node x) { return unary(mode, x, intermediate(x.layout)); }
  Node binary(cudnnPointwiseMode_t mode, Node a, Node b, Node y) {
    pointwise(
        mode, CUDNN_DATA_FLOAT,
        {{CUDNN_ATTR_OPERATION_POINTWISE_XDESC, a}, {CUDNN_ATTR_OPERATION_POINTWISE_BDESC, b}}, y);
    return y;
  }
  Node binary(cudnnPointwiseMode_t mode, Node a, Node b) {
    return binary(mode, a, b, intermediate(a.layout));
  }

  /// x up to the diagonal, -inf above it.
  Node causal(Node x) {
    const Node row = index(x, 2), column = index(x, 3);
    const Node seen = intermediate(x.layout, CUDNN_DATA_BOOLEAN);
    pointwise(CUDNN_POINTWISE_CMP_GE, CUDNN_DATA_BOOLEAN,
              {{CUDNN_ATTR_OPERATION_POINTWISE_XDESC, row},
               {CUDNN_ATTR_OPERATION_POINTWISE_BDESC, column}},
              seen);
    const Node y = intermediate(x.layout);
    pointwise(CUDNN_POINTWISE_BINARY_SELECT, CUDNN_DATA_FLOAT,
              {{CUDNN_ATTR_OPERATION_POINTWISE_XDESC, x},
               {CUDNN_ATTR_OPERATION_POINTWISE_BDESC, scalar(uid_minus_infinity)},
               {CUDNN_ATTR_OPERATION_POINTWISE_TDESC, seen}},
              y);
    return y;
  }

  /// The graph, last, and what it is made of.
  std::vector<Descriptor> finish() && {
    keep(Descriptor(CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR)
             .set(CUDNN_ATTR_OPERATIONGRAPH_HANDLE, handle())
             .set_all(CUDNN_ATTR_OPERATIONGRAPH_OPS, operations_)
             .finalize("graph"));
    return std::move(parts_);
  }

 private:
  using Inputs = std::vector<std::pair<cudnnBackendAttributeName_t, Node>>;

  cudnnBackendDescriptor_t keep(Descriptor& d) {
    parts_.push_back(std::move(d));
    return parts_.back().raw();
  }
  void add(Descriptor& operation) { operations_.push_back(keep(operation)); }

  Node add_tensor(int64_t uid, const Layout& layout, cudnnDataType_t type, bool is_virtual,
                  bool is_by_value) {
    constexpr int64_t alignment = 16;  // bytes
    const auto raw = keep(Descriptor(CUDNN_BACKEND_TENSOR_DESCRIPTOR)
                              .set(CUDNN_ATTR_TENSOR_UNIQUE_ID, uid)
                              .set(CUDNN_ATTR_TENSOR_DATA_TYPE, type)
                              .set_all(CUDNN_ATTR_TENSOR_DIMENSIONS, layout.extent)
                              .set_all(CUDNN_ATTR_TENSOR_STRIDES, layout.stride)
                              .set(CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, alignment)
                              .set(CUDNN_ATTR_TENSOR_IS_VIRTUAL, is_virtual)
                              .set(CUDNN_ATTR_TENSOR_IS_BY_VALUE, is_by_value)
                              .finalize("tensor"));
    return {raw, layout};
  }

  Node index(Node x, int64_t axis) {
    const Node y = intermediate(x.layout, CUDNN_DATA_INT32);
    pointwise(CUDNN_POINTWISE_GEN_INDEX, CUDNN_DATA_FLOAT,
              {{CUDNN_ATTR_OPERATION_POINTWISE_XDESC, x}}, y, axis);
    return y;
  }

  void pointwise(cudnnPointwiseMode_t mode, cudnnDataType_t compute, const Inputs& inputs, Node y,
                 int64_t axis = -1) {
    Descriptor how(CUDNN_BACKEND_POINTWISE_DESCRIPTOR);
    how.set(CUDNN_ATTR_POINTWISE_MODE, mode).set(CUDNN_ATTR_POINTWISE_MATH_PREC, compute);
    if (axis >= 0) how.set(CUDNN_ATTR_POINTWISE_AXIS, axis);
    Descriptor operation(CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR);
    operation.set(CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, keep(how.finalize("pointwise")));
    for (const auto& [name, node] : inputs) operation.set(name, node.raw);
    add(operation.set(CUDNN_ATTR_OPERATION_POINTWISE_YDESC, y.raw).finalize("pointwise"));
  }

  std::vector<Descriptor> parts_;
  std::vector<cudnnBackendDescriptor_t> operations_;
  int64_t intermediates_ = 0;
};

// What is [N, N] per head and what is one number per row.
Layout scores_of(const Layout& q) {
  return packed(q.extent[0], q.extent[1], q.extent[2], q.extent[2]);
}
Layout row_of(const Layout& q) {
  return packed(q.extent[0], q.extent[1], q.extent[2], 1);
}

Graph forward_graph(const Key& key) {
  const Layout scores = scores_of(key[uid_q]), row = row_of(key[uid_q]);
  Graph g;
  const Node q = g.tensor(uid_q, key[uid_q]), kt = g.tensor(uid_k, key[uid_k].transposed());
  Node s = g.matmul(q, kt, g.intermediate(scores));
  s = g.binary(CUDNN_POINTWISE_MUL, s, g.scalar(uid_scale));
  s = g.causal(s);

  const Node max = g.reduce(CUDNN_REDUCE_TENSOR_MAX, s, g.intermediate(row));
  const Node e = g.unary(CUDNN_POINTWISE_EXP, g.binary(CUDNN_POINTWISE_SUB, s, max));
  const Node sum = g.reduce(CUDNN_REDUCE_TENSOR_ADD, e, g.intermediate(row));
  g.binary(CUDNN_POINTWISE_ADD, max, g.unary(CUDNN_POINTWISE_LOG, sum),
           g.tensor(uid_lse, key[uid_lse], CUDNN_DATA_FLOAT));

  const Node p = g.binary(CUDNN_POINTWISE_DIV, e, sum, g.intermediate(scores, CUDNN_DATA_BFLOAT16));
  g.matmul(p, g.tensor(uid_v, key[uid_v]), g.tensor(uid_o, key[uid_o]));
  return g;
}

/// The sum over queries of x^T y, x [N, N] and y [N, D] per query head, for each kv head.
void sum_over_queries(Graph& g, Node x, Node y, Node sum) {
  const Node xt = g.reshape(x, g.intermediate(x.layout.transposed(), CUDNN_DATA_BFLOAT16));
  const auto [B, H, N, D] = y.layout.extent;
  if (sum.layout.extent[1] == H) {
    g.matmul(xt, y, sum);
  } else {
    const Node of_head = g.intermediate(packed(B, H, N, D), CUDNN_DATA_BFLOAT16);
    g.reduce(CUDNN_REDUCE_TENSOR_ADD, g.matmul(xt, y, of_head), sum);
  }
}

Graph backward_graph(const Key& key) {
  const Layout scores = scores_of(key[uid_q]), row = row_of(key[uid_q]);
  Graph g;
  const Node q = g.tensor(uid_q, key[uid_q]), kt = g.tensor(uid_k, key[uid_k].transposed());
  const Node vt = g.tensor(uid_v, key[uid_v].transposed()), o = g.tensor(uid_o, key[uid_o]);
  const Node dout = g.tensor(uid_dout, key[uid_dout]);
  const Node scale = g.scalar(uid_scale);

  // cuDNN looks for a product with a scalar here, which dropout would use.
  const auto [B, H, N, D] = key[uid_q].extent;
  Node x = g.binary(CUDNN_POINTWISE_MUL, dout, o, g.intermediate(packed(B, H, N, D)));
  x = g.reduce(CUDNN_REDUCE_TENSOR_ADD, x, g.intermediate(row));
  const Node delta = g.binary(CUDNN_POINTWISE_MUL, x, g.scalar(uid_one),
                              g.tensor(uid_delta, row, CUDNN_DATA_FLOAT));

  x = g.matmul(q, kt, g.intermediate(scores));
  x = g.binary(CUDNN_POINTWISE_MUL, x, scale);
  x = g.binary(CUDNN_POINTWISE_SUB, x, g.tensor(uid_lse, key[uid_lse], CUDNN_DATA_FLOAT));
  const Node p = g.unary(CUDNN_POINTWISE_EXP, g.causal(x));
  sum_over_queries(g, p, dout, g.tensor(uid_dv, key[uid_dv]));

  x = g.matmul(dout, vt, g.intermediate(scores));
  x = g.binary(CUDNN_POINTWISE_SUB, x, delta);
  x = g.binary(CUDNN_POINTWISE_MUL, x, p);
  const Node ds = g.binary(CUDNN_POINTWISE_MUL, x, scale);
  sum_over_queries(g, ds, q, g.tensor(uid_dk, key[uid_dk]));

  const Node k = g.reshape(kt, g.intermediate(key[uid_k], CUDNN_DATA_BFLOAT16));
  g.matmul(ds, k, g.tensor(uid_dq, key[uid_dq]));
  return g;
}

// ---- Plans --------------------------------------------------------------------------------------

struct Plan {
  std::vector<Descriptor> parts;  // the last is the plan
  int64_t workspace = 0;          // bytes
  std::string refusal;            // why there is none
};

/// The first of the engine configurations that cuDNN recommends for a graph, best first, that
/// works.
Plan make_plan(Graph graph) {
  Plan plan;
  plan.parts = std::move(graph).finish();
  Descriptor heuristics(CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR);
  heuristics.set(CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, plan.parts.back().raw())
      .set(CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_HEUR_MODE_A)
      .finalize("heuristics");

  int64_t count = 0;
  const auto results = [&](int64_t room, cudnnBackendDescriptor_t* into) {
    accept(cudnnBackendGetAttribute(heuristics.raw(), CUDNN_ATTR_ENGINEHEUR_RESULTS,
                                    CUDNN_TYPE_BACKEND_DESCRIPTOR, room, &count, into),
           "engines");
  };
  results(0, nullptr);
  std::vector<Descriptor> engines;
  std::vector<cudnnBackendDescriptor_t> raw;
  for (int64_t i = 0; i < count; ++i) {
    engines.emplace_back(CUDNN_BACKEND_ENGINECFG_DESCRIPTOR);
    raw.push_back(engines.back().raw());
  }
  results(count, raw.data());

  std::string why = "no engine";
  for (int64_t i = 0; i < count; ++i) {
    try {
      Descriptor made(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR);
      made.set(CUDNN_ATTR_EXECUTION_PLAN_HANDLE, handle())
          .set(CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, raw[i])
          .finalize("plan");
      accept(cudnnBackendGetAttribute(made.raw(), CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE,
                                      CUDNN_TYPE_INT64, 1, nullptr, &plan.workspace),
             "workspace");
      plan.parts.push_back(std::move(engines[i]));
      plan.parts.push_back(std::move(made));
      return plan;
    } catch (const Refusal& refusal) {
      why = refusal.why;
    }
  }
  throw Refusal{why};
}

const Plan& plan_for(const Key& key) {
  static auto& plans = *new std::map<Key, Plan>;  // never freed: CUDA may be gone at exit
  const auto known = plans.find(key);
  if (known != plans.end()) return known->second;
  Plan plan;
  try {
    plan = make_plan(key.size() > uid_dout ? backward_graph(key) : forward_graph(key));
  } catch (const Refusal& refusal) {
    plan.refusal = refusal.why;
  }
  return plans.emplace(key, std::move(plan)).first->second;
}

// ---- The problem --------------------------------------------------------------------------------

/// A tensor of the problem, in the order of a Key.
struct Operand {
  Layout layout;  // [B, H, N, D]
  std::byte* data;
  int64_t element;  // bytes
};
using Operands = std::vector<Operand>;

Operand operand(const Tensor& t) {
  return {{{t[0], t[1], t[2], t[3]}, {t.stride[0], t.stride[1], t.stride[2], t.stride[3]}},
          static_cast<std::byte*>(t.data),
          static_cast<int64_t>(size_of(t.dtype))};
}
Operand operand(const AttentionProblem& p, const float* lse) {
  return {packed(p.B, p.Hq, p.N, 1), reinterpret_cast<std::byte*>(const_cast<float*>(lse)),
          sizeof(float)};
}

/// Whether every row of a bf16 tensor may start at a multiple of 16 bytes, which cuDNN takes on
/// trust.
bool aligned(const Layout& x) {
  const auto& s = x.stride;
  return s[3] == 1 && (x.extent[3] | s[0] | s[1] | s[2]) % 8 == 0;
}

/// What training has, as far as q and k tell: v and the gradients lie as q and k do, o and dout as
/// the rows [B, N, Hq D] that the next matrix multiplies.
Operands expected(const AttentionProblem& p, const Tensor& q, const Tensor& k, bool backward) {
  Tensor o = q;
  o.stride = {p.N * p.Hq * p.D, p.D, p.Hq * p.D, 1};
  Operands all = {operand(q), operand(k), operand(k), operand(o), operand(p, nullptr)};
  if (backward) all.insert(all.end(), {operand(o), operand(q), operand(k), operand(k)});
  return all;
}

/// What one execution of a plan takes.
struct Slice {
  int64_t sequences, groups;  // of every sequence so many kv heads and their query heads

  Layout of(Layout whole, int64_t kv_heads) const {
    whole.extent[0] = sequences;
    whole.extent[1] = whole.extent[1] / kv_heads * groups;
    return whole;
  }
};

int64_t largest_divisor(int64_t n, int64_t most) {
  int64_t d = std::min(n, most);
  while (n % d != 0) --d;
  return d;
}

/// dS of a slice takes 2 GiB at most; no sequences where it would for a single group.
Slice slice_of(const AttentionProblem& p, bool backward) {
  if (!backward) return {p.B, p.Hkv};
  constexpr int64_t most = int64_t{1} << 31;
  const int64_t groups = most / (p.g * p.N * p.N * int64_t{sizeof(bf16)});
  if (groups == 0) return {0, 0};
  if (groups < p.Hkv) return {1, largest_divisor(p.Hkv, groups)};
  return {largest_divisor(p.B, groups / p.Hkv), p.Hkv};
}

const Plan& plan_for(const AttentionProblem& p, const Slice& slice, const Operands& operands) {
  Key key;
  for (const Operand& x : operands) key.push_back(slice.of(x.layout, p.Hkv));
  return plan_for(key);
}

/// delta f32 [sequences, heads, N] comes first in scratch, then cuDNN's workspace.
int64_t delta_bytes(const AttentionProblem& p, const Slice& slice, bool backward) {
  constexpr int64_t alignment = 256;
  const int64_t bytes = slice.sequences * slice.groups * p.g * p.N * int64_t{sizeof(float)};
  return backward ? ceil_div(bytes, alignment) * alignment : 0;
}

int64_t scratch_bytes(const AttentionProblem& p, const Operands& operands, bool backward) {
  const Slice slice = slice_of(p, backward);
  return delta_bytes(p, slice, backward) + plan_for(p, slice, operands).workspace;
}

/// Runs the plan over all slices; room: the bytes of scratch.
void run(const AttentionProblem& p, const Operands& operands, void* scratch, int64_t room) {
  const bool backward = operands.size() > uid_dout;
  const Slice slice = slice_of(p, backward);
  const Plan& plan = plan_for(p, slice, operands);
  if (!plan.refusal.empty()) throw Refusal{plan.refusal};
  if (delta_bytes(p, slice, backward) + plan.workspace > room) {
    throw Refusal{"attention: these strides need more scratch than those of q and k let expect"};
  }
  for (const Operand& x : operands) {
    const bool is_lse = &x == &operands[uid_lse];
    if (!is_lse && (!aligned(x.layout) || reinterpret_cast<uintptr_t>(x.data) % 16 != 0)) {
      throw Refusal{"attention: a row of heads does not start at a multiple of 16 bytes"};
    }
  }

  float scale = p.scale(), minus_infinity = -std::numeric_limits<float>::infinity(), one = 1;
  void* workspace = static_cast<std::byte*>(scratch) + delta_bytes(p, slice, backward);
  std::vector<int64_t> uids = {uid_scale, uid_minus_infinity};
  std::vector<void*> data = {&scale, &minus_infinity};
  if (backward) {
    uids.insert(uids.end(), {uid_one, uid_delta});
    data.insert(data.end(), {&one, scratch});
  }
  const size_t of_problem = uids.size();
  for (size_t i = 0; i < operands.size(); ++i) uids.push_back(static_cast<int64_t>(i));

  for (int64_t b = 0; b < p.B; b += slice.sequences) {
    for (int64_t r = 0; r < p.Hkv; r += slice.groups) {
      data.resize(of_problem);
      for (const Operand& x : operands) {
        const int64_t head = r * (x.layout.extent[1] / p.Hkv);
        data.push_back(x.data + x.element * (b * x.layout.stride[0] + head * x.layout.stride[1]));
      }
      Descriptor pack(CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR);
      pack.set_all(CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, uids)
          .set(CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR,
               static_cast<int64_t>(data.size()), data.data())
          .set(CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &workspace)
          .finalize("pointers");
      accept(cudnnBackendExecute(handle(), plan.parts.back().raw(), pack.raw()), "attention");
    }
  }
}

int compute_capability() {
  int device = 0, major = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "capability");
  return major;
}

}  // namespace

bool dense_attention_takes(const AttentionProblem& p, const Tensor& q, const Tensor& k) {
  // Up to cuDNN 9.15 backward errs at lengths that are no multiple of 128. That dQ is deterministic
  // without a buffer holds up to Hopper.
  if (!p.dense() || p.keys != p.N || p.N < 2 || q.dtype != DType::bf16 ||
      !aligned(operand(q).layout) || !aligned(operand(k).layout) ||
      (cudnnGetVersion() < 91600 && p.N % 128 != 0) || compute_capability() > 9) {
    return false;
  }
  for (const bool backward : {false, true}) {
    const Slice slice = slice_of(p, backward);
    if (slice.sequences == 0) return false;
    if (!plan_for(p, slice, expected(p, q, k, backward)).refusal.empty()) return false;
  }
  return true;
}

int64_t dense_attention_scratch(const AttentionProblem& p, const Tensor& q, const Tensor& k,
                                bool backward) {
  return scratch_bytes(p, expected(p, q, k, backward), backward);
}

void dense_attention(const AttentionProblem& p, const Tensor& q, const Tensor& k, const Tensor& v,
                     const Tensor& o, float* lse, void* scratch) try {
  run(p, {operand(q), operand(k), operand(v), operand(o), operand(p, lse)}, scratch,
      dense_attention_scratch(p, q, k, false));
} catch (const Refusal& refusal) {
  fail(refusal.why);
}

void dense_attention_backward(const AttentionProblem& p, const Tensor& q, const Tensor& k,
                              const Tensor& v, const Tensor& o, const Tensor& dout,
                              const float* lse, const Tensor& dq, const Tensor& dk,
                              const Tensor& dv, void* scratch) try {
  run(p,
      {operand(q), operand(k), operand(v), operand(o), operand(p, lse), operand(dout), operand(dq),
       operand(dk), operand(dv)},
      scratch, dense_attention_scratch(p, q, k, true));
} catch (const Refusal& refusal) {
  fail(refusal.why);
}

}  // namespace entrain::cuda

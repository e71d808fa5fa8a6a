// A device that is simulated on the CPU: its tensors lie in host memory and are computed by PyTorch's CPU kernels, but
// PyTorch takes them for tensors of another device. An operation that mixes them with tensors of the CPU fails where
// it would on CUDA. Bytes alive are counted by storage; transfers and synchronisations are told to a listener.
//
// The device has the type "hpu", which PyTorch's own builds know and have no kernels for; simulated_device.py calls it
// "cuda".

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/HPUHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <set>
#include <string>

namespace {

constexpr auto DEVICE = c10::DeviceType::HPU;
constexpr auto KEY = c10::DispatchKey::HPU;
constexpr int64_t UNIT = 512;  // bytes to which CUDA's caching allocator rounds

std::atomic<int64_t> alive{0}, peak{0}, operations{0}, limit{INT64_MAX};
void (*listener)(const char* event, int64_t bytes, const char* what) = nullptr;

void tell(const char* event, int64_t bytes, const std::string& what) {
  if (listener != nullptr) listener(event, bytes, what.c_str());
}

// --- memory ---------------------------------------------------------------------------------------------------------

struct Held {  // what a storage of the device owns: bytes of its own, or the CPU storage that a kernel has made
  void* own;
  c10::Storage from;
  int64_t bytes;
};

void release(void* context) {
  auto* held = static_cast<Held*>(context);
  alive -= held->bytes;
  std::free(held->own);
  delete held;
}

int64_t rounded_up(size_t bytes) { return (static_cast<int64_t>(bytes) + UNIT - 1) / UNIT * UNIT; }

void check_room(size_t bytes) {
  TORCH_CHECK_WITH(OutOfMemoryError, alive + rounded_up(bytes) <= limit, "CUDA out of memory. Tried to allocate ", bytes,
                   " bytes. GPU 0 has a total capacity of ", limit.load(), " bytes, of which ", alive.load(),
                   " are allocated.");
}

c10::DataPtr counted(void* data, void* own, c10::Storage from, size_t bytes) {
  int64_t rounded = rounded_up(bytes);
  int64_t now = alive += rounded;
  int64_t before = peak;
  while (now > before && !peak.compare_exchange_weak(before, now)) {
  }
  return {data, new Held{own, std::move(from), rounded}, &release, c10::Device(DEVICE, 0)};
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    check_room(bytes);
    void* data = bytes ? std::aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr;
    TORCH_CHECK_WITH(OutOfMemoryError, data || !bytes, "the simulated device has no memory left");
    return counted(data, data, {}, bytes);
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(DEVICE, &memory)

// --- streams and events, of which there is one and none --------------------------------------------------------------

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DEVICE> {
  c10::Device exchangeDevice(c10::Device) const override { return {DEVICE, 0}; }
  c10::Device getDevice() const override { return {DEVICE, 0}; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, {DEVICE, 0}); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, {DEVICE, 0}); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(HPU, Guard)

// --- tensors of the device seen as tensors of the CPU, and back ------------------------------------------------------

bool is_here(const at::Tensor& t) { return t.defined() && t.device().type() == DEVICE; }

at::Tensor seen(const at::Tensor& t) {  // the same memory, as a tensor of the CPU
  const auto& storage = t.storage();
  c10::Storage view(c10::Storage::use_byte_size_t(), storage.nbytes(),
                    c10::DataPtr(const_cast<void*>(storage.data()), c10::Device(c10::kCPU)), c10::GetCPUAllocator(), true);
  auto out = at::detail::make_tensor<c10::TensorImpl>(std::move(view), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                      t.dtype());
  auto* impl = out.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  if (t.is_conj()) impl->_set_conj(true);
  if (t.is_neg()) impl->_set_neg(true);
  return out;
}

at::Tensor placed(c10::Storage storage, const at::Tensor& like) {  // a tensor of the device
  auto out = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(KEY), like.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return out;
}

at::Tensor view(const at::Tensor& of, const at::Tensor& like) {  // a view of a tensor of the device
  // Of an inference tensor it is one, of another tensor none, also in inference mode.
  auto out = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(of.storage()), of.key_set(),
                                                      like.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return out;
}

struct Call {  // the arguments of an operation on the device
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs;  // (of the device, as the CPU sees it)

  at::Tensor enter(const at::Tensor& t) {
    if (!is_here(t)) return t;
    pairs.emplace_back(t, seen(t));
    return pairs.back().second;
  }

  at::Tensor leave(const at::Tensor& out) {
    if (!out.defined() || is_here(out)) return out;
    for (auto& [own, other] : pairs) {
      if (other.unsafeGetTensorImpl() == out.unsafeGetTensorImpl()) {
        if (out.storage().data() != own.storage().data()) {  // the kernel has made it larger
          auto from = out.storage();
          check_room(from.nbytes());
          own.storage().set_data_ptr_noswap(counted(const_cast<void*>(from.data()), nullptr, from, from.nbytes()));
          own.storage().set_nbytes(from.nbytes());
        }
        if (own.sizes() != out.sizes() || own.strides() != out.strides() || own.storage_offset() != out.storage_offset())
          own.unsafeGetTensorImpl()->set_sizes_and_strides(out.sizes(), out.strides(), out.storage_offset());
        return own;
      }
    }
    void* data = const_cast<void*>(out.storage().data());
    for (auto& [own, other] : pairs)
      if (data != nullptr && other.storage().data() == data) return view(own, out);
    auto storage = out.storage();
    check_room(storage.nbytes());
    return placed(c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(),
                               counted(data, nullptr, storage, storage.nbytes()), &memory, true), out);
  }
};

// --- what CUDA refuses, and where it waits ---------------------------------------------------------------------------

// Index tensors of the CPU are moved to the device by these; all other tensors of the CPU must have no dimension.
const std::set<std::string> INDEXED = {"aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_",
                                       "aten::index_put", "aten::index.Tensor_out", "aten::_unsafe_index.Tensor"};
// Operations whose result has a size, or an error, that the host waits for.
const std::set<std::string> WAITS = {
    "aten::nonzero", "aten::masked_select", "aten::equal", "aten::repeat_interleave.Tensor", "aten::_unique2",
    "aten::unique_dim", "aten::unique_consecutive", "aten::bincount", "aten::_linalg_eigh", "aten::_linalg_svd",
    "aten::cholesky_inverse", "aten::cholesky_inverse.out", "aten::multinomial", "aten::_linalg_check_errors"};
// Not implemented for whole numbers on CUDA.
const std::set<std::string> FLOATING = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::mm.out",
                                        "aten::addmm.out", "aten::addmm_", "aten::mv", "aten::dot"};

bool by_mask(const std::string& name, const torch::jit::Stack& arguments) {  // an index that is found by a mask first
  if (!INDEXED.count(name)) return false;
  if (name.find("put") == std::string::npos) return false;  // asks for `nonzero` itself
  bool masks = false;
  for (const auto& index : arguments[1].toListRef())
    if (index.isTensor() && index.toTensor().defined() && index.toTensor().scalar_type() == at::kBool) masks = true;
  return masks && arguments[2].toTensor().dim() != 0;  // a number is filled in without
}

void check(const std::string& name, const std::vector<at::Tensor>& given, const torch::jit::Stack& arguments) {
  at::Tensor wanted;
  for (const auto& t : given)
    if (is_here(t)) wanted = t;
  if (!wanted.defined()) return;
  const bool indexed = INDEXED.count(name);
  for (size_t i = 0; i < given.size(); ++i) {
    const auto& t = given[i];
    if (!t.defined() || is_here(t) || t.dim() == 0) continue;
    if (indexed && i > 0 && is_here(given[0]) && t.scalar_type() != at::kFloat) {
      tell("to device", t.nbytes(), name);
      continue;
    }
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ",
                "(argument ", i, " of ", name, ")");
  }
  if (FLOATING.count(name))
    TORCH_CHECK_NOT_IMPLEMENTED(at::isFloatingType(wanted.scalar_type()) || at::isComplexType(wanted.scalar_type()),
                                "\"", name, "_cuda\" not implemented for '", wanted.scalar_type(), "'");
}

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  ++operations;
  const auto& schema = op.schema();
  const std::string name = schema.name() + (schema.overload_name().empty() ? "" : "." + schema.overload_name());
  const size_t count = schema.arguments().size(), first = stack->size() - count;
  torch::jit::Stack arguments(stack->begin() + first, stack->end());
  std::vector<at::Tensor> given;
  for (const auto& value : arguments) {
    if (value.isTensor()) {
      given.push_back(value.toTensor());
    } else if (value.isTensorList()) {
      for (const at::Tensor t : value.toTensorList()) given.push_back(t);
    } else if (value.isList()) {
      for (const auto& part : value.toListRef())
        if (part.isTensor()) given.push_back(part.toTensor());
    } else if (value.isGenerator()) {
      TORCH_CHECK(value.toGenerator().device().type() == DEVICE,
                  "Expected a 'cuda' device type for generator but found '", value.toGenerator().device(), "'");
    }
  }
  check(name, given, arguments);
  if (WAITS.count(name) || by_mask(name, arguments)) tell("wait", 0, name);
  Call call;
  for (size_t i = 0; i < count; ++i) {
    auto& value = (*stack)[first + i];
    if (value.isTensor()) {
      value = call.enter(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> all;
      for (const at::Tensor t : value.toTensorList()) all.push_back(call.enter(t));
      value = all;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> all;
      for (const std::optional<at::Tensor> t : value.toOptionalTensorList())
        all.push_back(t.has_value() ? std::optional<at::Tensor>(call.enter(*t)) : t);
      value = all;
    } else if (value.isDevice() && value.toDevice().type() == DEVICE) {
      value = c10::Device(c10::kCPU);
    }
  }
  {
    at::AutoDispatchBelowAutograd below;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  const size_t results = stack->size() - first;
  for (size_t i = 0; i < results; ++i) {
    auto& value = (*stack)[first + i];
    if (value.isTensor()) {
      value = call.leave(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> all;
      for (const at::Tensor t : value.toTensorList()) all.push_back(call.leave(t));
      value = all;
    }
  }
}

// --- what is not computed: room, copies, numbers ---------------------------------------------------------------------

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(KEY), c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(KEY),
                                           c10::dtype_or_default(dtype));
}

at::Tensor& copy_(at::Tensor& to, const at::Tensor& from, bool) {
  const bool moves = is_here(to) != is_here(from);
  if (moves && from.numel()) tell(is_here(to) ? "to device" : "to host", from.nbytes(), "aten::copy_");
  auto target = is_here(to) ? seen(to) : to;
  target.copy_(is_here(from) ? seen(from) : from);
  return to;
}

at::Scalar number(const at::Tensor& t) {
  tell("wait", 0, "aten::item");
  return seen(t).item();
}

at::Tensor& set_storage(at::Tensor& t, at::Storage from, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  auto* impl = t.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(from));
  if (stride.empty() && !size.empty()) {
    impl->set_sizes_contiguous(size);
    impl->set_storage_offset(offset);
  } else {
    impl->set_sizes_and_strides(size, stride, offset);
  }
  return t;
}

at::Tensor& set_whole(at::Tensor& t, at::Storage from) {
  const int64_t count = static_cast<int64_t>(from.nbytes() / t.dtype().itemsize());
  return set_storage(t, std::move(from), 0, {count}, {});
}

at::Tensor& set_tensor(at::Tensor& t, const at::Tensor& from) {
  return set_storage(t, from.storage(), from.storage_offset(), from.sizes(), from.strides());
}

const at::Tensor& resize_(const at::Tensor& t, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  const size_t needed = c10::multiply_integers(size) * t.dtype().itemsize() + t.storage_offset() * t.dtype().itemsize();
  auto* storage = t.storage().unsafeGetStorageImpl();
  if (needed > storage->nbytes()) {
    auto data = memory.allocate(needed);
    if (storage->nbytes()) std::memcpy(data.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(data));
    storage->set_nbytes(needed);
  }
  t.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return t;
}

// --- attention without a matrix of scores, by the CPU's kernel -------------------------------------------------------

int64_t choice(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& mask,
               double dropout, bool causal, std::optional<double> scale, bool grouped) {
  auto as_seen = [](const at::Tensor& t) { return is_here(t) ? seen(t).requires_grad_(t.requires_grad()) : t; };
  std::optional<at::Tensor> own = mask.has_value() && mask->defined() ? std::optional(as_seen(*mask)) : std::nullopt;
  const auto found = at::_fused_sdp_choice(as_seen(q), as_seen(k), as_seen(v), own, dropout, causal, scale, grouped);
  return found == 1 ? 4 : 0;  // flash attention: this device's own; else by a matrix of scores
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, c10::SymInt, c10::SymInt, at::Tensor, at::Tensor, at::Tensor>
attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& mask,
       double dropout, bool causal, bool, std::optional<double> scale) {
  Call call;
  std::optional<at::Tensor> own = mask.has_value() && mask->defined() ? std::optional(call.enter(*mask)) : std::nullopt;
  auto [out, sums] = at::_scaled_dot_product_flash_attention_for_cpu(call.enter(q), call.enter(k), call.enter(v), dropout,
                                                                     causal, own, scale);
  auto none = at::empty({0}, q.options().dtype(at::kLong));
  return {call.leave(out), call.leave(sums), none, none, q.size(2), k.size(2), none, none, none};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> attend_backward(
    const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& bias,
    std::array<bool, 4>, const at::Tensor& out, const at::Tensor& sums, const at::Tensor&, const at::Tensor&, int64_t,
    int64_t, double dropout, bool causal, const at::Tensor&, const at::Tensor&, std::optional<double> scale) {
  Call call;
  std::optional<at::Tensor> own = bias.defined() ? std::optional(call.enter(bias)) : std::nullopt;
  auto [a, b, c] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      call.enter(grad), call.enter(q), call.enter(k), call.enter(v), call.enter(out), call.enter(sums), dropout, causal,
      own, scale);
  return {call.leave(a), call.leave(b), call.leave(c), at::Tensor()};
}

TORCH_LIBRARY_IMPL(_, HPU, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }

TORCH_LIBRARY_IMPL(aten, HPU, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("_local_scalar_dense", &number);
  m.impl("set_.source_Storage", &set_whole);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("resize_", &resize_);
  m.impl("_scaled_dot_product_fused_attention_overrideable", &attend);
  m.impl("_scaled_dot_product_fused_attention_overrideable_backward", &attend_backward);
}

TORCH_LIBRARY_IMPL(_, AutocastHPU, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

#define LOW(...) KERNEL(DEVICE, __VA_ARGS__, lower_precision_fp)
#define FULL(...) KERNEL(DEVICE, __VA_ARGS__, fp32)
#define SUMS(...) KERNEL(DEVICE, __VA_ARGS__, fp32_set_opt_dtype)
#define WIDER(...) KERNEL(DEVICE, __VA_ARGS__, promote)
TORCH_LIBRARY_IMPL(aten, AutocastHPU, m) {
  using namespace at::autocast;
  AT_FORALL_LOWER_PRECISION_FP(LOW)
  AT_FORALL_FP32(FULL)
  AT_FORALL_FP32_SET_OPT_DTYPE(SUMS)
  AT_FORALL_PROMOTE(WIDER)
}

}  // namespace

namespace at {
struct HPUHooks final : HPUHooksInterface {  // found by this name
  explicit HPUHooks(HPUHooksArgs) {}
  void init() const override {}
  bool hasHPU() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  Device getDeviceFromPtr(void*) const override { return {DEVICE, 0}; }
};
REGISTER_HPU_HOOKS(HPUHooks)
}  // namespace at

namespace at::native {
REGISTER_HPU_DISPATCH(_fused_sdp_choice_stub, &choice)
}

extern "C" {
void simulated_listen(void (*to)(const char*, int64_t, const char*)) { listener = to; }
int64_t simulated_alive() { return alive; }
int64_t simulated_peak() { return peak; }
int64_t simulated_operations() { return operations; }
void simulated_limit(int64_t bytes) { limit = bytes; }
void simulated_restart() { peak = alive.load(); operations = 0; }
}

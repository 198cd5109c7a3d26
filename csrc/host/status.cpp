#include "host/status.h"

#include <cstdarg>
#include <cstdio>

namespace nsa {
namespace {

Status format_status(StatusCode code, const char* format, std::va_list arguments) {
  Status status;
  status.code = code;
  std::vsnprintf(status.message, sizeof(status.message), format, arguments);
  return status;
}

}  // namespace

Status invalid_argument(const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  const Status status = format_status(StatusCode::kInvalidArgument, format, arguments);
  va_end(arguments);
  return status;
}

Status not_supported(const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  const Status status = format_status(StatusCode::kNotSupported, format, arguments);
  va_end(arguments);
  return status;
}

const char* name_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64:
      return "float64";
    case Dtype::kFloat32:
      return "float32";
    case Dtype::kBFloat16:
      return "bfloat16";
    case Dtype::kFloat16:
      return "float16";
  }
  return "unknown";
}

const char* name_of(Device device) {
  switch (device) {
    case Device::kCpu:
      return "cpu";
    case Device::kCuda:
      return "cuda";
  }
  return "unknown";
}

const char* name_of(Backend backend) {
  switch (backend) {
    case Backend::kAuto:
      return "auto";
    case Backend::kCpu:
      return "cpu";
    case Backend::kSm80:
      return "sm80";
    case Backend::kSm90:
      return "sm90";
  }
  return "unknown";
}

}  // namespace nsa

// Device queries that never throw: a machine without a driver has zero devices.
#pragma once

namespace rainkernels {

int cuda_device_count();
int cuda_runtime_version();
const char* cuda_error_name(int error);

}  // namespace rainkernels

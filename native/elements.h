// The plain elements that tensors have.
#pragma once

namespace freehold {

enum class Element : int { float32 = 0, bfloat16 = 1 };

}  // namespace freehold

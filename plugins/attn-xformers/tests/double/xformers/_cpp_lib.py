"""Whether the extension was loaded: it was not, and this is why."""

_cpp_library_load_exception = RuntimeError("the double has no extension")
_built_with_cuda = False

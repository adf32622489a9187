from attn_core.conformance import parametrize_kernel_checks


@parametrize_kernel_checks(["example-kernel/attend"])
def test_kernel(check):
    check()

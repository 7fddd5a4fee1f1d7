import torch


def test_fresh_memory_is_nan() -> None:
    assert torch.empty(5).isnan().all()
    assert torch.zeros(3, dtype=torch.bfloat16).new_empty(5).isnan().all()
    assert torch.empty_strided((2, 3), (3, 1), dtype=torch.float64).isnan().all()

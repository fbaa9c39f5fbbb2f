"""The scripts here need torch: they are not collected."""

collect_ignore = ["make_golden.py", "nets_torch.py", "families_torch.py"]

"""Peaks of GPUs' matrix products, by which an MFU is a fraction.

Dense bf16 with fp32 accumulation, in TFLOP/s, which is what training runs; fp16 where a GPU has no
bf16 units. By the whole name that torch.cuda.get_device_name gives, so that a slice of a GPU (MIG),
a laptop's version or a card that is not listed has no peak: --peak_tflops names it.
"""

# NVIDIA's data sheets; where they give figures with sparsity alone, half of those. Tesla: fp16.
_DATA_SHEETS = {
    "Tesla V100-SXM2-16GB": 125.0,  # Tesla V100
    "Tesla V100-SXM2-32GB": 125.0,
    "Tesla V100-PCIE-16GB": 112.0,
    "Tesla V100-PCIE-32GB": 112.0,
    "Tesla V100S-PCIE-32GB": 130.0,
    "Tesla T4": 65.0,  # T4 Tensor Core GPU
    "NVIDIA A10": 125.0,
    "NVIDIA A10G": 70.0,  # A10G, for Amazon's G5; not an A10
    "NVIDIA A30": 165.0,
    "NVIDIA A40": 149.7,
    "NVIDIA A100-SXM4-40GB": 312.0,  # A100: SXM and PCIe alike
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA A800-SXM4-80GB": 312.0,  # an A100 with slower links
    "NVIDIA A800 80GB PCIe": 312.0,
    "NVIDIA L4": 121.0,
    "NVIDIA L40": 181.05,
    "NVIDIA L40S": 362.05,
    "NVIDIA H100 80GB HBM3": 989.5,  # H100: SXM, PCIe and NVL differ
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H800": 989.5,  # an H100 with slower links
    "NVIDIA H800 PCIe": 756.5,
    "NVIDIA H20": 148.0,
    "NVIDIA H200": 989.5,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA GH200 480GB": 989.5,  # GH200 Grace Hopper Superchip: its GPU; the name has the CPU's GB
    "NVIDIA GH200 144G HBM3e": 989.5,
    "NVIDIA B200": 2250.0,  # Blackwell Architecture Technical Brief: HGX B200, GB200 NVL72
    "NVIDIA GB200": 2500.0,
    "NVIDIA B300 SXM6 AC": 2250.0,  # HGX B300
}
# Cores and boost clock in MHz, from NVIDIA's data sheets and white papers (GA102, Ada, RTX
# Blackwell), which print the product for some of them: 154.8, 364.2 and 503.8 TFLOP/s for the
# RTX A6000, 6000 Ada and PRO 6000; 71, 165.2 and 209.5 for the GeForce RTX 3090, 4090 and 5090.
_WORKSTATION = {  # 8 operations for each core and cycle
    "NVIDIA RTX A4000": (6144, 1560),
    "NVIDIA RTX A5000": (8192, 1695),
    "NVIDIA RTX A6000": (10752, 1800),
    "NVIDIA RTX 6000 Ada Generation": (18176, 2505),
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": (24064, 2617),
}
_GEFORCE = {  # 4 operations: with fp32 accumulation at half the rate of fp16 accumulation
    "RTX 3060": (3584, 1777),
    "RTX 3060 Ti": (4864, 1665),
    "RTX 3070": (5888, 1725),
    "RTX 3070 Ti": (6144, 1770),
    "RTX 3080": (8704, 1710),  # with 10 GB; that with 12 GB has the same name and 3 % more
    "RTX 3080 Ti": (10240, 1665),
    "RTX 3090": (10496, 1695),
    "RTX 3090 Ti": (10752, 1860),
    "RTX 4060": (3072, 2460),
    "RTX 4060 Ti": (4352, 2535),
    "RTX 4070": (5888, 2475),
    "RTX 4070 SUPER": (7168, 2475),
    "RTX 4070 Ti": (7680, 2610),
    "RTX 4070 Ti SUPER": (8448, 2610),
    "RTX 4080": (9728, 2505),
    "RTX 4080 SUPER": (10240, 2550),
    "RTX 4090": (16384, 2520),
    "RTX 5070": (6144, 2512),
    "RTX 5070 Ti": (8960, 2452),
    "RTX 5080": (10752, 2617),
    "RTX 5090": (21760, 2407),
}
PEAK_TFLOPS = (
    _DATA_SHEETS
    | {name: 8e-6 * cores * mhz for name, (cores, mhz) in _WORKSTATION.items()}
    | {f"NVIDIA GeForce {name}": 4e-6 * cores * mhz for name, (cores, mhz) in _GEFORCE.items()}
)


def peak_tflops(device_name: str, given: float = 0.0) -> float | None:
    """The peak of a device: the `given` one, or that of its name; None where neither is there."""
    return given or PEAK_TFLOPS.get(device_name)

"""What the launches that do not pass the gates are known for: figures of one version of Triton."""

TRITON = "3.9."
"""The compiler that made the figures."""

Group = tuple[str, str, int]
"""Kernel, type that decides the arithmetic, rows of the tile."""

EXPECTED: dict[Group, dict[str, float]] = {
    ("_axis64_kernel", "fp64", 16): {
        "sm_100": 170.8,
        "sm_80": 163.2,
        "sm_90": 166.4,
    },
    ("_axis64_kernel", "fp64", 32): {
        "gfx942": 88.6,
        "sm_100": 254.6,
        "sm_80": 227.7,
        "sm_90": 240.3,
    },
    ("_axis64_kernel", "fp64", 64): {
        "gfx942": 569.8,
        "sm_100": 570.6,
        "sm_80": 517.9,
        "sm_90": 551.6,
    },
    ("_axis64_kernel", "fp64", 128): {
        "gfx942": 209.9,
        "sm_100": 320.2,
        "sm_80": 317.2,
        "sm_90": 320.2,
    },
    ("_axis64_kernel", "fp64", 256): {
        "gfx942": 200.7,
        "sm_100": 552.8,
        "sm_80": 633.6,
        "sm_90": 542.0,
    },
    ("_axis64_kernel", "fp64", 512): {
        "gfx942": 326.7,
        "sm_100": 906.3,
        "sm_80": 1039.6,
        "sm_90": 888.6,
    },
    ("_axis_kernel", "16 bit", 64): {
        "gfx942": 46.9,
    },
    ("_axis_kernel", "16 bit", 128): {
        "gfx942": 42.6,
        "sm_100": 34.9,
        "sm_80": 49.3,
    },
    ("_axis_kernel", "16 bit", 256): {
        "sm_100": 36.9,
    },
    ("_axis_kernel", "16 bit", 512): {
        "sm_100": 24.5,
        "sm_90": 21.7,
    },
    ("_axis_kernel", "fp32", 32): {
        "gfx942": 50.6,
    },
    ("_axis_kernel", "fp32", 64): {
        "sm_100": 31.6,
    },
    ("_axis_kernel", "fp32", 128): {
        "sm_100": 69.9,
        "sm_80": 90.2,
    },
    ("_axis_kernel", "fp32", 256): {
        "gfx942": 81.2,
        "sm_100": 99.0,
        "sm_80": 145.6,
        "sm_90": 96.1,
    },
    ("_axis_kernel", "fp32", 512): {
        "gfx942": 57.6,
        "sm_100": 113.0,
        "sm_80": 120.1,
        "sm_90": 85.3,
    },
    ("_fused_kernel", "16 bit", 64): {
        "gfx942": 96.0,
        "sm_100": 102.3,
        "sm_80": 158.7,
        "sm_90": 48.5,
    },
    ("_fused_kernel", "16 bit", 128): {
        "gfx942": 683.4,
        "sm_100": 49.5,
        "sm_80": 349.1,
        "sm_90": 42.8,
    },
    ("_fused_kernel", "16 bit", 192): {
        "sm_90": 21.4,
    },
    ("_fused_kernel", "16 bit", 256): {
        "gfx942": 516.4,
        "sm_100": 150.5,
        "sm_80": 266.3,
        "sm_90": 51.7,
    },
    ("_fused_kernel", "fp32", 64): {
        "sm_80": 73.1,
    },
    ("_pass_kernel", "fp32", 64): {
        "gfx942": 33.3,
        "sm_100": 178.3,
        "sm_80": 177.0,
        "sm_90": 179.3,
    },
    ("_pass_kernel", "fp32", 128): {
        "gfx942": 42.2,
        "sm_100": 178.8,
        "sm_80": 169.4,
        "sm_90": 169.2,
    },
    ("_pass_kernel", "fp32", 256): {
        "gfx942": 103.1,
        "sm_100": 342.7,
        "sm_80": 346.4,
        "sm_90": 346.7,
    },
    ("_pass_kernel", "fp64", 64): {
        "gfx942": 45.6,
        "sm_100": 60.6,
        "sm_80": 51.6,
        "sm_90": 59.0,
    },
    ("_pass_kernel", "fp64", 128): {
        "gfx942": 60.6,
        "sm_100": 66.9,
        "sm_80": 66.4,
        "sm_90": 64.9,
    },
    ("_pass_kernel", "fp64", 256): {
        "gfx942": 91.7,
        "sm_100": 174.7,
        "sm_80": 134.6,
        "sm_90": 174.3,
    },
    ("_rope_kernel", "16 bit", 64): {
        "gfx942": 33.2,
        "sm_100": 27.7,
        "sm_80": 53.3,
        "sm_90": 33.1,
    },
    ("_rows_kernel", "16 bit", 64): {
        "gfx942": 88.4,
        "sm_100": 36.1,
        "sm_80": 43.4,
    },
    ("_rows_kernel", "16 bit", 128): {
        "gfx942": 150.1,
        "sm_100": 39.7,
        "sm_80": 75.5,
    },
    ("_rows_kernel", "16 bit", 256): {
        "gfx942": 60.0,
        "sm_100": 24.9,
        "sm_80": 39.8,
    },
    ("_rows_kernel", "fp32", 64): {
        "sm_100": 49.3,
        "sm_80": 97.7,
        "sm_90": 41.7,
    },
    ("_rows_kernel", "fp32", 128): {
        "sm_100": 49.2,
        "sm_80": 96.2,
    },
    ("_rows_kernel", "fp32", 256): {
        "sm_100": 48.2,
        "sm_80": 75.8,
        "sm_90": 50.8,
    },
}
"""The most instructions per element of the padded tile, of launches that take longer to issue than
memory takes to move."""

KNOWN: dict[str, dict[str, tuple[str, ...]]] = {
    "sm_80": {
        "axis 12 in 16x64, run 20 fp64-fp64": ("not all products were counted",),
        "axis 44 in 64x32, run 2 fp64-fp64": ("not all products were counted",),
        "fused 11008/11008 in 256x64 activation fp8 bf16-bf16": ("48 spills",),
        "fused 11008/11008 in 256x64 activation mxfp4 bf16-bf16": ("24 spills",),
        "fused 11008/11008 in 256x64 gelu fp8 bf16-bf16": ("238 spills",),
        "fused 14336/14336 in 128x128 activation bf16-bf16": ("12 spills",),
        "fused 14336/14336 in 128x128 activation mxfp4 bf16-bf16": ("22 spills",),
        "fused 14336/14336 in 128x128 activation nvfp4 bf16-bf16": ("22 spills",),
        "fused 14336/14336 in 128x128 activation signs fp8 bf16-bf16": ("89 spills",),
        "fused 14336/14336 in 128x128 eps gamma mxfp4 bf16-bf16": ("24 spills",),
        "fused 14336/14336 in 128x128 gamma fp8 bf16-bf16": ("48 spills",),
        "fused 4096/16 in 256x16 nvfp4 bf16-bf16": ("stores of 8",),
        "rows 172x64 in 256x64 fp32-fp32": ("24 spills",),
    },
    "sm_90": {
        "axis 12 in 16x64, run 20 fp64-fp64": ("not all products were counted",),
        "axis 44 in 64x32, run 2 fp64-fp64": ("not all products were counted",),
        "fused 28672/128 in 256x128 activation fp8 bf16-bf16": ("10 spills",),
        "fused 4096/16 in 256x16 nvfp4 bf16-bf16": ("stores of 8",),
        "rows 128x256 in 128x256 bf16-bf16": ("82 spills",),
        "rows 12x240 in 64x256 bf16-bf16": ("590 spills",),
        "rows 148x128 in 192x128 bf16-bf16": ("94 spills",),
    },
    "sm_100": {
        "axis 112 in 128x64, run 1048576 bf16-fp32": ("24 spills",),
        "axis 112 in 128x64, run 1048576 bf16-fp32 signs": ("24 spills",),
        "axis 12 in 16x64, run 20 fp64-fp64": ("not all products were counted",),
        "axis 128 in 128x64, run 8192 bf16-bf16 transposed": ("20 spills",),
        "axis 128 in 128x64, run 8192 fp32-fp32": ("12 spills",),
        "axis 256 in 256x32, run 8192 fp32-fp32": ("10 spills",),
        "axis 44 in 64x32, run 2 fp64-fp64": ("not all products were counted",),
        "fused 4096/16 in 256x16 nvfp4 bf16-bf16": ("stores of 8",),
        "fused 4096/4096 in 64x64 eps bf16-bf16": ("23 spills",),
        "fused 4096/4096 in 64x64 fp8 fp32-fp32": ("10 spills",),
        "fused 4096/4096 in 64x64 gamma mxfp4 bf16-bf16": ("12 spills",),
        "rows 64x64 in 64x64 bf16-bf16 signs": ("12 spills",),
    },
    "gfx942": {
        "axis 12 in 16x64, run 20 fp64-fp64": ("not all products were counted",),
        "axis 12 in 16x64, run 2464 fp64-fp64": ("3 spills",),
        "axis 128 in 128x64, run 8192 fp32-bf16": ("loads of 8 bytes",),
        "axis 128 in 128x64, run 8192 fp32-fp32": ("loads of 8 bytes",),
        "axis 172 in 256x16, run 1 fp64-fp64": ("8 spills",),
        "axis 20 in 32x64, run 1 fp64-fp64": ("219 spills",),
        "axis 256 in 256x32, run 8192 fp32-bf16": ("loads of 8 bytes",),
        "axis 256 in 256x32, run 8192 fp32-fp32": ("loads of 8 bytes",),
        "axis 256 in 256x64, run 2097152 bf16-fp32": ("loads of 8 bytes",),
        "axis 284 in 512x16, run 1 fp64-fp64": ("8 spills",),
        "fused 128/128 in 64x128 eps fp8 fp16-fp16": ("loads of 8 bytes",),
        "fused 14336/14336 in 128x128 activation mxfp4 bf16-bf16": ("35 spills",),
        "fused 14336/14336 in 128x128 activation nvfp4 bf16-bf16": ("31 spills",),
        "fused 14336/14336 in 128x128 activation signs fp8 bf16-bf16": ("36 spills",),
        "fused 14336/14336 in 128x128 gamma fp8 bf16-bf16": ("9 spills",),
        "fused 4096/128 in 64x128 fp8 bf16-bf16": ("loads of 8 bytes",),
        "fused 4096/4096 in 64x64 gamma mxfp4 bf16-bf16": (
            "81920 of 65536 bytes of shared memory",
        ),
        "fused 8192/8192 in 128x64 gelu int8 bf16-bf16": ("147 spills",),
        "pass 224x64 along in 256x64 bf16-bf16 fp32": ("8 spills",),
        "pass 224x64 along in 256x64 bf16-bf16 fp64": ("34 spills",),
        "rows 1x128 in 64x128 bf16-bf16": ("loads of 8 bytes",),
        "rows 1x128 in 64x128 bf16-bf16 signs": ("loads of 8 bytes",),
        "rows 64x64 in 64x64 bf16-bf16 signs": ("4 spills",),
    },
}
"""By architecture and launch, what else falls short."""

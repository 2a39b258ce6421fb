"""python bench/bench_machine.py [--device cpu] -> the ceilings of this machine: a large copy and a large bf16 matmul."""

from dit_ops.bench import measure
from dit_ops.bench.runs import arguments

if __name__ == "__main__":
    args = arguments(__doc__)
    copy, matmul = measure.copy_rate(args.device), measure.matmul_rate(args.device)
    rates = {"copy_GB/s": round(copy, 1), "matmul_TFLOP/s": round(matmul, 2)}
    measure.write({"op": "machine", **rates, **measure.about(args.device)}, args.output)

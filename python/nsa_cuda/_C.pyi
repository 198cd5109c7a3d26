# The C++ module (csrc/binding/module.cpp): nsa.h with tensors as numbers.
# Addresses are ints, 0 is null; strides count elements.
# ValueError: an argument that can't be right; NotImplementedError: no kernel for it here; RuntimeError: CUDA refused.

TensorTuple = tuple[int, int, int, int]  # address, batch_stride, row_stride, head_stride
IndicesTuple = tuple[int, bool, int, int, int, int]  # address, is_int64, batch, row, head and entry stride
CountsTuple = tuple[int, bool, int, int, int]  # address, is_int64, batch, row and head stride
GatesTuple = tuple[int, int, int, int, int, int]  # address, nsa::Dtype, batch, row, head and branch stride

class Problem:
    def __init__(
        self,
        device: int,
        backend: int,
        dtype: int,
        batch: int,
        seqlen_q: int,
        seqlen_k: int,
        num_heads_q: int,
        num_heads_k: int,
        head_dim_qk: int,
        head_dim_v: int,
        block_size: int,
        num_indices: int,
        causal: bool,
        softmax_scale: float,
        cu_seqlens_q: int,
        cu_seqlens_k: int,
        q_offsets: int,
        has_q_offset: bool,
        q_offset: int,
        block_indices: IndicesTuple,
        block_counts: CountsTuple,
        block_count: int,
        /,
    ) -> None: ...

# num_threads: what the call that follows will name; on the CPU every thread has scratch of its own.
def forward_workspace(problem: Problem, want_lse: bool, /, num_threads: int = 0) -> int: ...
def backward_workspace(
    problem: Problem, need_dq: bool, need_dk: bool, need_dv: bool, has_dlse: bool, /, num_threads: int = 0
) -> int: ...
def forward(
    problem: Problem,
    q: TensorTuple,
    k: TensorTuple,
    v: TensorTuple,
    o: TensorTuple,
    lse: TensorTuple,
    workspace: int,
    workspace_bytes: int,
    stream: int,
    num_threads: int,
    /,
) -> None: ...
def backward(
    problem: Problem,
    q: TensorTuple,
    k: TensorTuple,
    v: TensorTuple,
    o: TensorTuple,
    lse: TensorTuple,
    dout: TensorTuple,
    dlse: TensorTuple,
    delta: TensorTuple,
    gate: GatesTuple,
    dq: TensorTuple,
    dk: TensorTuple,
    dv: TensorTuple,
    accumulate_dq: bool,
    workspace: int,
    workspace_bytes: int,
    stream: int,
    num_threads: int,
    /,
) -> None: ...

GatedSizesTuple = tuple[int, int, int, int, int, int]  # nsa::Device, nsa::Dtype, B, Tq, Hq, Dv

def gated_sum_forward(
    sizes: GatedSizesTuple,
    o_cmp: TensorTuple,
    o_slc: TensorTuple,
    o_win: TensorTuple,
    gates: GatesTuple,
    o: TensorTuple,
    stream: int,
    num_threads: int,
    /,
) -> None: ...
def gated_sum_backward(
    sizes: GatedSizesTuple,
    dout: TensorTuple,
    o_cmp: TensorTuple,
    o_slc: TensorTuple,
    o_win: TensorTuple,
    dgates: GatesTuple,
    stream: int,
    num_threads: int,
    /,
) -> None: ...

class RangeProblem:
    def __init__(
        self,
        device: int,
        backend: int,
        dtype: int,
        batch: int,
        seqlen_q: int,
        seqlen_k: int,
        num_heads_q: int,
        num_heads_k: int,
        head_dim_qk: int,
        head_dim_v: int,
        mask: int,
        window_size: int,
        kernel_size: int,
        kernel_stride: int,
        num_tokens: int,
        causal: bool,
        softmax_scale: float,
        cu_seqlens_q: int,
        cu_seqlens_k: int,
        q_offsets: int,
        has_q_offset: bool,
        q_offset: int,
        /,
    ) -> None: ...

def range_forward_workspace(problem: RangeProblem, want_lse: bool, num_threads: int, /) -> int: ...
def range_backward_workspace(
    problem: RangeProblem, need_dq: bool, need_dk: bool, need_dv: bool, has_dlse: bool, num_threads: int, /
) -> int: ...
def range_forward(
    problem: RangeProblem,
    q: TensorTuple,
    k: TensorTuple,
    v: TensorTuple,
    o: TensorTuple,
    lse: TensorTuple,
    workspace: int,
    workspace_bytes: int,
    stream: int,
    num_threads: int,
    /,
) -> None: ...
def range_backward(
    problem: RangeProblem,
    q: TensorTuple,
    k: TensorTuple,
    v: TensorTuple,
    o: TensorTuple,
    lse: TensorTuple,
    dout: TensorTuple,
    dlse: TensorTuple,
    delta: TensorTuple,
    gate: GatesTuple,
    dq: TensorTuple,
    dk: TensorTuple,
    dv: TensorTuple,
    accumulate_dq: bool,
    workspace: int,
    workspace_bytes: int,
    stream: int,
    num_threads: int,
    /,
) -> None: ...
def selection_workspace(
    problem: RangeProblem,
    block_size: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    num_threads: int,
    /,
) -> int: ...
def select_blocks(
    problem: RangeProblem,
    block_size: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    q: TensorTuple,
    k: TensorTuple,
    lse: TensorTuple,
    block_indices: int,
    workspace: int,
    workspace_bytes: int,
    stream: int,
    num_threads: int,
    /,
) -> None: ...
def kernel_name(problem: Problem, /) -> str: ...

# name, query_rows, keys, stages, threads, shared_memory, ctas
KernelTuple = tuple[str, int, int, int, int, int, int]

# gpu: compute capability (90), SMs, bytes of shared memory a CTA may have; (0, 0, 0): the current device.
# Returns forward, dq, dkdv, windows, window_rows.
def choose_selected_attention(
    problem: Problem, gpu: tuple[int, int, int], /
) -> tuple[KernelTuple, KernelTuple, KernelTuple, int, int]: ...
def version() -> str: ...
def built_with_cuda() -> bool: ...
def cuda_architectures() -> str: ...
def cuda_toolkit() -> str: ...
def compiled_kernels() -> list[str]: ...

"""Single instructions that Numba has no name for."""
from llvmlite import ir
from numba import types
from numba.extending import intrinsic


@intrinsic
def floats_at(typingctx, address):
    "The float32 at an address, `Tensor.data_ptr()`: half of what a NumPy view of a tensor costs is its making."
    def code(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))
    return types.CPointer(types.float32)(types.int64), code


def _of_two(name):
    """The lesser or the greater of two floats, neither of them NaN. `min` and `max` are a comparison and a choice, of
    which LLVM 22 makes a masked store where the result goes back into an array: on AMD eight times as long."""
    @intrinsic
    def instruction(typingctx, a, b):
        def code(context, builder, signature, args):
            t = context.get_value_type(signature.return_type)
            f = builder.module.declare_intrinsic(name, (t,), ir.FunctionType(t, (t, t)))
            return builder.call(f, args, fastmath=('nnan', 'nsz'))
        return a(a, b), code
    return instruction

lesser, greater = _of_two('llvm.minnum'), _of_two('llvm.maxnum')

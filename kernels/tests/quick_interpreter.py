"""Triton's interpreter, quicker.

It looks through the whole language at every launch, again at every call of a function within a kernel, and computes
every sum and product of integers a second time, in 64 bits, for an assertion of overflow that it then does not make.
And most of its time goes to types and shapes, which it makes anew for every tensor: here each is made once.
It also multiplies tiles of any size, where compilers for GPUs want at least 16 to sum over: here it wants them too.
"""

import dataclasses
import functools
import inspect
import math


def quicken():
    """Lets the interpreter look up once what it replaces of the language, and leave out what it throws away."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    assert not builder.options.debug  # else it asserts
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    builder.codegen_fns["min_dot_size"] = lambda *_: (1, 1, 16)
    is_builtin = interpreter.tl.core.is_builtin

    @functools.cache
    def builtins(package):
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    @functools.cache
    def for_interpreter(member):
        # Past the wrapper that asks whether `_semantic` was given, which is given here.
        inner = member.__wrapped__ if member.__code__ is asking else member

        def call(*args, **options):
            options["_semantic"] = interpreter.interpreter_semantic
            return inner(*args, **options)

        return call

    asking = interpreter.tl.core.builtin(lambda: None).__code__

    def patch(package, builder, *scope):
        set_attribute = scope[0].set_attr if scope else setattr
        for name in builtins(package):
            member = getattr(package, name)
            if is_builtin(member):
                set_attribute(package, name, for_interpreter(member))

    @functools.cache
    def languages(function):
        known = (interpreter.tl, interpreter.tl.core)
        return [value for value in function.__globals__.values() if inspect.ismodule(value) and value in known]

    patch_language, scope_of = interpreter._patch_lang, getattr(interpreter, "_LangPatchScope", type(None))

    def patch_once(function):
        # What a kernel calls finds the language replaced as a rule; its own scope puts it back.
        if any(is_builtin(language.load) for language in languages(function)):
            return patch_language(function)
        return scope_of()

    interpreter._patch_builtin, interpreter._patch_lang = patch, patch_once
    share_shapes(interpreter.tl.core)
    remember_types(interpreter)
    remember_numbers(interpreter)


def share_shapes(core):
    """Lets types of blocks and tensors of one shape have one object for it, and equal shapes be told by that."""
    make_block, equal, unwrap_all = core.block_type.__init__, core.dtype.__eq__, core._unwrap_if_constexpr

    @functools.lru_cache(maxsize=None, typed=True)
    def shared(*sizes):
        block = object.__new__(core.block_type)
        make_block(block, core.float32, list(sizes))
        return block.shape, block.numel

    def block_init(self, element_ty, shape):
        self.element_ty = element_ty
        self.shape, self.numel = shared(*map(unwrap, shape))

    @functools.cache
    def of_tensor(*sizes):
        return core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))

    def tensor_init(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = of_tensor(*type.shape.values) if type.is_block() else of_tensor()

    plain = (int, bool, float, str, core.tensor, core.dtype, core.pointer_type, core.block_type)

    def unwrap(value):
        return value if value.__class__ in plain else unwrap_all(value)

    core.block_type.__init__, core.tensor.__init__ = block_init, tensor_init
    core.block_type.name = name = functools.cached_property(lambda self: f"<{self.shape}, {self.element_ty}>")
    name.__set_name__(core.block_type, "name")
    core._unwrap_if_constexpr = unwrap
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)


def remember_types(interpreter):
    """Lets the interpreter look up what two types make together, and what a type is in numpy."""
    semantic, block_type = interpreter.TritonSemantic, interpreter.tl.block_type
    in_numpy, numpy_types = interpreter._get_np_dtype, {}
    together, common_types = semantic.computation_type_impl, {}
    broadcast, common_shapes = semantic.broadcast_impl_value, {}

    def get_np_dtype(of):
        if isinstance(of, block_type):
            of = of.element_ty
        if of.is_ptr():
            return in_numpy(of)
        if of.name not in numpy_types:
            numpy_types[of.name] = in_numpy(of)
        return numpy_types[of.name]

    def computation_type(self, a, a_is_scalar, b, *how):
        key = a.name, a_is_scalar, b.name, *how
        if key not in common_types:
            common_types[key] = together(self, a, a_is_scalar, b, *how)
        return common_types[key]

    def broadcast_value(self, left, right):
        a, b = left.type, right.type
        if a.is_block() != b.is_block():
            return (left, splat(self, right, a)) if a.is_block() else (splat(self, left, b), right)
        if not a.is_block() or a.shape is b.shape:
            return left, right
        if len(a.shape) != len(b.shape):
            return broadcast(self, left, right)
        key = id(a.shape), id(b.shape)  # which are shared, and so stay
        if key not in common_shapes:
            common_shapes[key] = broadcast(self, left, right)[0].type.shape
        return tuple(spread(self, tensor, common_shapes[key]) for tensor in (left, right))

    def spread(self, tensor, shape):
        if tensor.type.shape is shape:
            return tensor
        handle = self.builder.create_broadcast(tensor.handle, shape.values)
        return self.make_tensor(handle, block_type(tensor.type.scalar, shape))

    def splat(self, scalar, like):
        block = block_type(scalar.dtype, like.shape)
        return self.make_tensor(self.builder.create_splat(block, scalar.handle), block)

    interpreter._get_np_dtype = get_np_dtype
    semantic.computation_type_impl, semantic.broadcast_impl_value = computation_type, broadcast_value


def remember_numbers(interpreter):
    """Lets two tensors of one type go together as they are, and numbers beside tensors become one once."""
    semantic, numbers = interpreter.TritonSemantic, {}
    made_alike = semantic.binary_op_type_checking_impl

    def alike(self, left, right, allow_left=False, allow_right=False, arithmetic=True, divides=False):
        of = left.dtype if left.__class__ is self.tensor else getattr(right, "dtype", None)
        if arithmetic and of is not None and not of.is_ptr():
            a, b = of_type(self, left, of, divides), of_type(self, right, of, divides)
            if a is not None and b is not None:
                return self.broadcast_impl_value(a, b)
        return made_alike(self, left, right, allow_left, allow_right, arithmetic, divides)

    def of_type(self, value, of, divides):
        """A tensor of a type that computes in itself, or a number as one; nothing where types differ."""
        if value.__class__ is self.tensor:
            same = value.dtype is of and self.computation_type_impl(of, False, of, False, divides) is of
            return value if same else None
        key = repr(value), of.name, divides
        if key not in numbers:
            common = self.computation_type_impl(of, False, self.to_tensor_type(value), True, divides)
            numbers[key] = self._cast_to_computation_type(value, of) if common is of else None
        return numbers[key]

    semantic.binary_op_type_checking_impl = alike

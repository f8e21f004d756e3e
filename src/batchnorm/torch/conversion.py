"""`convert` gives the batch norm modules of a model this package's classes, and `revert` gives PyTorch's back."""

from typing import TypeVar

import torch

from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .sync import SyncBatchNorm

Model = TypeVar("Model", bound=torch.nn.Module)

_OURS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.BatchNorm1d: BatchNorm1d,
    torch.nn.BatchNorm2d: BatchNorm2d,
    torch.nn.BatchNorm3d: BatchNorm3d,
    torch.nn.SyncBatchNorm: SyncBatchNorm,
}


def convert(model: Model) -> Model:
    """Give each `torch.nn.BatchNorm1d`, `2d`, `3d` and `SyncBatchNorm` of a model the class of this package, in place.

    Parameters, buffers, hooks and flags stay the same objects, so an optimizer may hold them already. Subclasses, and
    lazy modules that have not seen a batch, are left alone.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    torch.nn.Module
        The model itself.

    Examples
    --------
    >>> import torch
    >>> from batchnorm.torch import convert, revert
    >>> model = convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)))
    >>> type(model[1]).__module__, type(revert(model)[1]).__module__
    ('batchnorm.torch.modules', 'torch.nn.modules.batchnorm')
    """
    for module in model.modules():
        if type(module) in _OURS:
            module.__class__ = _OURS[type(module)]
    return model


def revert(model: Model) -> Model:
    """Undo `convert`, in place, even for modules that were created with this package's classes.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    torch.nn.Module
        The model itself.

    Raises
    ------
    ValueError
        If a module has an activation, which PyTorch's class would lose. Nothing is changed then.
    """
    theirs = {ours: their for their, ours in _OURS.items()}
    found = {name: module for name, module in model.named_modules() if type(module) in theirs}
    for name, module in found.items():
        if module.activation is not None:
            raise ValueError(
                f"model must have no activation in its batch norm modules, got {module.activation!r} in {name!r}: "
                "add a module for the activation after it and set .activation = None"
            )
    for module in found.values():
        module.__class__ = theirs[type(module)]
    return model

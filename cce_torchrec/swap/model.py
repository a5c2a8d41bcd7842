"""Swapping compressed collections into an existing model."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from cce_torchrec.collection import CompressedEmbeddingBagCollection
from cce_torchrec.methods import METHODS, FullTable, MethodConfig
from cce_torchrec.recluster import ReclusterConfig
from cce_torchrec.replace import Collection, Fit, present_methods, replace_tables
from cce_torchrec.swap.rules import CompressionPlan, CompressionRule, Rules, choose

logger = logging.getLogger(__name__)


def compress(
    model: nn.Module,
    rules: Rules | CompressionRule,
    *,
    from_trained: bool = False,
    seed: int = 0,
    config: ReclusterConfig | None = None,
    id_weights: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Replace the ``EmbeddingBagCollection``s inside a model by compressed ones; tables that no rule names stay full.

    Trained weights of the tables that stay full are kept; compressed tables start anew, since no id has an assignment yet.
    With ``from_trained`` they start as near as they can to the full tables that they replace (post-training quantisation);
    this takes methods with stored assignments, and full tables may stand in compressed collections too. Optimizers applied
    in backward are applied to the new codebooks; make other optimizers afterwards, and give them the dense parameters of
    decode methods and projections too. Do this before sharding. An ``EmbeddingBagCollection`` of which no table changes is
    left as it is.

    Args:
        model: changed in place; may itself be an ``EmbeddingBagCollection``.
        rules: method configs by table name; or :class:`CompressionRule` s, of which the first that matches counts; or a
            plan, as :func:`plan_compression` makes them, for tables of the sizes that it was made for.
        from_trained: whether to cluster the rows of the full tables: column by column, :class:`PQ` takes the centroids and
            the nearest of them, :class:`CCE` the mean residuals besides, :class:`ResidualCCE` level by level.
        seed: of that clustering; pass the same one on every rank.
        config: of that clustering; the defaults where ``None``.
        id_weights: how much each id matters in it, [num_embeddings] by table, such as its frequency; 1 where missing. Needed
            where only some ids are to have stored assignments: those of the largest weights get them.

    Returns:
        The model (a new collection where ``model`` itself was one).

    Raises:
        ValueError: where a named table does not exist, nothing matches, or a budget cannot be met (naming the table); with
            ``from_trained``, where a method has no assignments to learn, a table is not full, its weights are not finite, or
            ``id_weights`` are missing or do not fit.

    Example:
        >>> from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
        >>> item = EmbeddingBagConfig(name="t_item", num_embeddings=50_000, embedding_dim=16, feature_names=["item"])
        >>> model = nn.Sequential(EmbeddingBagCollection(tables=[item]))
        >>> model = compress(model, [CompressionRule(method="cce", min_num_embeddings=10_000, compression=16)])
        >>> type(model[0]).__name__
        'CompressedEmbeddingBagCollection'
    """
    rules = _checked(rules)
    for name, given in (("config", config), ("id_weights", id_weights)):
        if given is not None and not from_trained:
            raise ValueError(
                f"{name} is for tables that are fitted to trained ones: pass from_trained=True, or leave it out."
            )
    fit = Fit(seed, config or ReclusterConfig(), id_weights or {}) if from_trained else None
    found = list(_collections(model, also_compressed=from_trained))
    if isinstance(rules, Mapping | CompressionPlan):
        _check_names(rules if isinstance(rules, Mapping) else rules.methods, found)
    _check_names(id_weights or {}, found)
    replacements = {}  # by identity: a collection may stand at several places
    for _, collection in found:
        if id(collection) not in replacements:
            replacements[id(collection)] = _replacement(collection, rules, fit)
    if not any(replacements.values()):
        raise ValueError(
            f"No table is compressed by {rules}; the model's {len(found)} collections have {_table_names(found)} "
            "(those that are compressed or sharded already, and subclasses, are left alone)."
        )
    for name, collection in found:
        replacement = replacements[id(collection)]
        if replacement is not None:
            model = _put_in_place(model, name, replacement)
    return model


def _table_names(found: Sequence[tuple[str, Collection]]) -> list[str]:
    return [config.name for _, collection in found for config in collection.embedding_bag_configs()]


def _check_names(names: Iterable[str], found: Sequence[tuple[str, Collection]]) -> None:
    """Whether every table that is named is there."""
    tables = _table_names(found)
    unknown = [name for name in names if name not in tables]
    if unknown:
        raise ValueError(f"There is no table {unknown}; the model's tables are {tables}.")


def _put_in_place(model: nn.Module, name: str, replacement: CompressedEmbeddingBagCollection) -> nn.Module:
    """The model with another collection at a name; the collection itself where that is the whole model."""
    logger.info("Compressed %s: %s", name or type(model).__name__, replacement.embedding_bag_configs())
    if not name:
        return replacement
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, replacement)
    return model


def _checked(rules: Rules | CompressionRule) -> Rules:
    """The rules, or a ``ValueError`` that says what they may be."""
    if isinstance(rules, CompressionRule):
        return [rules]
    methods = rules.methods if isinstance(rules, CompressionPlan) else rules
    if isinstance(methods, Mapping) and all(isinstance(method, MethodConfig) for method in methods.values()):
        return rules
    is_list = isinstance(rules, Sequence) and not isinstance(rules, str)
    if is_list and all(isinstance(rule, CompressionRule) for rule in rules):  # type: ignore[union-attr]
        return rules
    raise ValueError(
        f"rules={rules!r} is neither a list of CompressionRule, nor method configs by table name such as "
        '{"t_item": CCE(num_rows=1024)}, nor a plan of plan_compression.'
    )


def _collections(module: nn.Module, also_compressed: bool, prefix: str = "") -> Iterator[tuple[str, Collection]]:
    """TorchRec's own collections in a module, at every place where they stand; compressed ones, not their insides."""
    if type(module) is EmbeddingBagCollection:
        yield prefix, module
    elif isinstance(module, CompressedEmbeddingBagCollection):
        if also_compressed:
            yield prefix, module
    else:
        for name, child in module._modules.items():  # named_children() leaves out what stands twice
            if child is not None:
                yield from _collections(child, also_compressed, f"{prefix}.{name}" if prefix else name)


def _replacement(collection: Collection, rules: Rules, fit: Fit | None) -> CompressedEmbeddingBagCollection | None:
    """The compressed collection that takes a collection's place, or ``None`` where no table changes."""
    methods, present = {}, present_methods(collection)
    for config in collection.embedding_bag_configs():
        is_full = isinstance(present[config.name], FullTable)
        if not is_full and not isinstance(rules, Mapping | CompressionPlan):
            continue  # such rules are for what is not compressed yet
        try:
            method = choose(config, rules)
            if method is not None:
                if not is_full:
                    raise ValueError(f"{present[config.name]} compresses it already: only full tables can be replaced.")
                if fit is not None:
                    _check_can_be_fitted(method, collection)
                methods[config.name] = method
        except ValueError as error:
            raise ValueError(f"Table {config.name!r}: {error}") from None
    return replace_tables(collection, methods, fit) if methods else None


def _check_can_be_fitted(method: MethodConfig, collection: Collection) -> None:
    if isinstance(method, FullTable):
        return
    if not method.stores_assignments:
        able = [key for key, other in METHODS.items() if other.stores_assignments]
        raise ValueError(
            f"from_trained=True cannot fit {method.key!r} to a trained table, only methods with stored rows of each id: take "
            f"one of {', '.join(able)}."
        )
    if collection.device.type == "meta":
        raise ValueError("from_trained=True needs trained weights, but these are on the meta device: load them first.")

"""Names in other libraries and papers for our keys, objectives and recipes."""

from collections.abc import Mapping


def _by_name(*groups: tuple[str, str]) -> dict[str, str]:
    """One entry for each name in groups of names separated by spaces."""
    return {name: text for names, text in groups for name in names.split()}


KEYS: Mapping[str, tuple[str, ...]] = {
    name: tuple(ours)
    for names, *ours in (
        ("lr learning_rate base_lr init_lr", "rate"),
        ("wd decay", "weight_decay"),
        ("bs batch batchsize per_device_batch_size", "batch_size"),
        ("temp tau t", "temperature"),
        ("max_epochs num_epochs n_epochs nb_epochs", "epochs"),
        ("steps max_steps num_steps iterations iters", "epochs", "min_steps"),
        ("warmup_epochs warmup_steps warmup_ratio", "warmup"),
        ("num_workers n_workers nworkers", "workers"),
        ("num_threads n_threads", "threads"),
        ("amp dtype mixed_precision", "precision"),
        ("grad_clip clip_grad clip_grad_norm max_norm max_grad_norm", "clip"),
        ("opt optimiser optimizer", "optim.name"),
        ("arch architecture backbone model model_name network net", "encoder.name"),
        ("proj_dim out_dim output_dim embed_dim embedding_dim embedding_size feature_dim low_dim", "projector.dim"),
        ("hidden_dim mlp_dim proj_hidden_dim", "projector.hidden"),
        ("loss criterion method", "objective", "loss"),
        ("dataset data_dir data_path datadir train_dir root images", "data"),
        ("img_size image_size input_size crop_size resolution", "views.size", "data.size", "size"),
        ("crops_scale min_scale rrc_scale", "crop_scale"),
        ("n_views num_crops n_crops crops", "num_views"),
        ("color_jitter jitter colour_jitter", "brightness", "contrast", "saturation"),
        ("grayscale gray grey", "greyscale"),
        ("hflip horizontal_flip", "flip"),
        ("vflip", "vertical_flip"),
        ("gaussian_blur", "blur"),
        ("solarization", "solarize"),
        ("queue_size memory_bank_size bank_size queue_length moco_k", "objective.size"),
        ("k", "objective.size", "knn.neighbours"),
        ("knn_k neighbors n_neighbors", "knn.neighbours", "neighbours"),
        ("moco_m ema_decay", "objective.momentum", "ema"),
        ("num_steps_ahead steps_to_predict prediction_steps", "objective.steps"),
        ("steps_to_ignore", "objective.skip"),
        ("patches_per_side num_patches grid_size", "encoder.context.patches"),
        ("nce_k nce_m num_negatives n_negatives neg", "objective.negatives"),
        ("m", "objective.negatives", "objective.m2", "objective.momentum", "objective.margin"),
        ("alpha", "objective.margin", "mixup"),
        ("s", "objective.scale"),
        ("mining miner sampler", "objective.sampling"),
        ("z", "normaliser"),
        ("p", "images_per_class"),
        ("out outdir out_dir output_folder logdir log_dir save_dir exp_dir name run_name", "output"),
        ("ckpt checkpoint checkpoint_path resume_from load", "resume"),
        ("save_every save_interval save_freq checkpoint_every", "save_minutes"),
        ("eval_every eval_interval val_interval eval_freq", "monitor", "checks"),
        ("log_interval print_freq log_freq log_every_n_steps", "log_every"),
        ("random_seed manual_seed", "seed"),
        ("labels_file label_file", "data.labels"),
        ("relation pairs triplets rankings pairs_file triplets_file constraints", "data.relations"),
        ("list_size slate_size slate_length", "items_per_query"),
        ("val val_dir test_dir valid eval_dir", "data.test"),
        ("label_fraction percent train_percent", "fraction"),
        ("layer_wise_decay lr_decay llrd", "layer_decay"),
        ("smoothing", "label_smoothing"),
    )
    for name in names.split()
}
"""A name in use elsewhere, in lower case: the ends of the keys that mean the same here, the likeliest first."""

_SIMCLR = "NT-Xent (InfoNCE) is objective=in_batch, as in recipe simclr"
_PAIRS = "the pairs' contrastive loss is objective=contrastive, as in recipes siamese and siamese_instances"
_ANGLE = "{} is objective=margin_softmax objective.preset={}, as in recipe {}"
_RANKING = "{} is objective=ranking objective.loss={}"
_TRIPLET_NETWORK = (
    "the triplet network's loss is objective=triplet objective.form=softmax objective.squared=false "
    "objective.normalized=false"
)
_ABSENT = "{} and is not here; the nearest that is: objective={}"
_CPC = (
    "contrastive predictive coding is recipe cpc; of whole views, its bilinear score is objective=in_batch "
    "objective.score=bilinear"
)
_PROXIES = (
    "a softmax over weights of classes is objective=margin_softmax objective.preset=norm_face (a classifier is trained "
    "by manyviews finetune)"
)

OBJECTIVES: Mapping[str, str] = _by_name(
    ("ntxent nt_xent simclr infonce info_nce", _SIMCLR),
    ("cpcv2 cpc_v2 contrastive_predictive_coding", _CPC),
    ("dcl decoupled", "decoupled contrastive learning is objective=in_batch objective.decoupled=true"),
    ("moco mocov2 mocov3", "MoCo is objective=queue, as in recipe moco"),
    ("supcon", "SupCon is objective=supervised with ids=labels, as in recipe supervised"),
    ("nnclr", "NNCLR is objective=nearest_neighbours, as in recipe nnclr"),
    ("npid instdisc instance_discrimination memory_bank wu2018", "instance discrimination is objective=bank"),
    ("nce", "NCE is objective=bank objective.estimator=nce, or objective=noise_contrastive with learned rows"),
    (
        "word2vec negative_sampling sgns",
        "negative sampling is objective=noise_contrastive objective.correction=false",
    ),
    ("siamese pairs pairwise", _PAIRS),
    ("facenet triplets", "FaceNet's loss is objective=triplet objective.sampling=semi_hard, as in recipe facenet"),
    ("batch_hard", "the batch-hard triplet loss is objective=triplet objective.sampling=hardest"),
    ("triplet_margin", "the triplet loss with a margin is objective=triplet, as in recipe facenet"),
    ("triplet_network triplet_net hoffer", _TRIPLET_NETWORK),
    ("triplet_ratio ratio", "the ratio of distances is objective=triplet objective.form=ratio"),
    ("npair npairs", "the N-pair loss is objective=n_pair"),
    ("byol simsiam", _ABSENT.format("it has no negatives", "queue, with a momentum twin, as in recipe moco")),
    ("barlow_twins barlow vicreg", _ABSENT.format("it decorrelates dimensions", "in_batch, as in recipe simclr")),
    (
        "dino dinov2 swav deepcluster",
        _ABSENT.format("it assigns clusters", "nearest_neighbours, as in recipe nnclr"),
    ),
    ("mae simmim ijepa", _ABSENT.format("it predicts hidden parts of an image", "in_batch, as in recipe simclr")),
    ("clip siglip", _ABSENT.format("it contrasts images with texts", "in_batch, as in recipe simclr")),
    ("softmax cross_entropy ce normalized_softmax proxy_nca proxy_anchor", _PROXIES),
    (
        "multi_similarity circle lifted_structure tuplet",
        _ABSENT.format("it weighs all pairs of a batch", "supervised, as in recipe supervised"),
    ),
    ("arcface aam", _ANGLE.format("ArcFace", "arcface", "arcface")),
    ("cosface lmcl am_softmax", _ANGLE.format("CosFace (LMCL)", "cosface", "cosface")),
    ("sphereface a_softmax asoftmax", _ANGLE.format("SphereFace (A-Softmax)", "sphereface", "sphereface")),
    ("normface", "NormFace is objective=margin_softmax objective.preset=norm_face"),
    ("listnet list_net", _RANKING.format("ListNet", "list_net") + ", as in recipe list_net"),
    ("listmle list_mle", _RANKING.format("ListMLE", "list_mle")),
    ("ranknet rank_net", _RANKING.format("RankNet", "rank_net")),
)
"""The name of a method, in lower case with underscores: its objective here."""

_HARDEST = "batch-hard mining (Hermans et al. 2017) is objective.sampling=hardest"
_FACENET = (
    "FaceNet's nearest negative beyond the positive is objective.sampling=semi_hard, and one of those within the "
    "margin objective.sampling=within_margin"
)
SAMPLINGS: Mapping[str, str] = _by_name(
    ("batch_hard batchhard hard_negative hardest_negative", _HARDEST),
    ("batch_all none no", "all pairs or triplets are objective.sampling=all"),
    ("distance dwm weighted", "that of Wu et al. 2017 is objective.sampling=distance_weighted"),
    ("semihard facenet", _FACENET),
)
"""Names of ways to mine pairs or triplets."""

_FORMS = (
    "[margin - d²]₊ is objective.form=hinge_of_squares, [margin - d]₊ hinge, and the square of that squared_hinge; for "
    "triplets, log(1 + e^x) is soft, Hoffer and Ailon's softmax, and Wohlhart and Lepetit's ratio"
)
FORMS: Mapping[str, str] = _by_name(
    ("squared square soft_margin softplus logistic soft_triplet plain linear l2 d2 quotient", _FORMS),
)
"""Names of forms of the losses of pairs and triplets."""

PRESETS: Mapping[str, str] = _by_name(
    ("lmcl am_softmax amsoftmax", "LMCL (AM-Softmax) is objective.preset=cosface"),
    ("a_softmax asoftmax", "A-Softmax is objective.preset=sphereface"),
    ("aam aam_softmax arc", "AAM-Softmax is objective.preset=arcface"),
    ("normalized_softmax nsoftmax", "the softmax of unit vectors is objective.preset=norm_face"),
)
"""Names of softmax losses with a margin."""

OPTIMIZERS: Mapping[str, str] = _by_name(
    ("adam nadam radam", "Adam is optim=adamw with optim.weight_decay=0"),
    ("sgdm momentum nesterov", "SGD with momentum is optim=sgd, with optim.momentum"),
    ("lamb", "for very large batches there is optim=lars"),
)
"""Names of optimizers."""

VALUES: Mapping[str, Mapping[str, str]] = {
    "objective": OBJECTIVES,
    "objective.sampling": SAMPLINGS,
    "objective.form": FORMS,
    "objective.preset": PRESETS,
    "optim.name": OPTIMIZERS,
}
"""By key, names of its values elsewhere."""


def plain(name: str) -> str:
    """Normalises a name: lower case, underscores, no "loss" at its end."""
    return name.strip().lower().replace("-", "_").replace(" ", "_").removesuffix("loss").rstrip("_")


RECIPES: Mapping[str, str] = _by_name(
    ("ntxent nt_xent infonce info_nce contrastive_learning", "simclr"),
    ("in_batch dcl decoupled", "quickstart"),
    ("cpcv2 cpc_v2 contrastive_predictive_coding", "cpc"),
    ("queue mocov2 moco_v2", "moco"),
    ("bank npid instdisc memory_bank wu2018", "instance_discrimination"),
    ("nce", "instance_discrimination_nce"),
    ("nearest_neighbours", "nnclr"),
    ("supcon", "supervised"),
    ("contrastive pairs pairwise", "siamese"),
    ("triplet triplets semi_hard batch_hard", "facenet"),
    ("margin distance_weighted sampling_matters", "margin_distance_weighted"),
    ("npair npairs", "n_pair"),
    ("logratio", "log_ratio"),
    ("ranking listnet", "list_net"),
    ("word2vec negative_sampling", "noise_contrastive"),
    ("margin_softmax aam", "arcface"),
    ("lmcl am_softmax", "cosface"),
    ("a_softmax asoftmax", "sphereface"),
)
"""The name of a method, in lower case with underscores: the recipe that trains with it."""

_SCHEDULE = "the rate rises over the share optim.warmup of the run and falls along a cosine; there is no other schedule"
_PROCESSES = (
    "the launcher starts the processes: accelerate launch --multi_gpu --num_processes N scripts/pretrain.py, or "
    "torchrun --nproc-per-node N"
)
_ACCUMULATION = (
    "gradient accumulation adds no negatives: each part of the batch would be contrasted with itself alone; "
    "train.batch_size is the whole batch, and train.chunk=… trains it with the memory of a part"
)
HINTS: Mapping[str, str] = _by_name(
    ("gpus devices num_gpus n_gpu nproc num_processes world_size nodes strategy", _PROCESSES),
    ("device cuda cpu", "the device is the best one that there is; CUDA_VISIBLE_DEVICES= hides the GPUs"),
    ("scheduler lr_scheduler lr_schedule schedule", _SCHEDULE),
    ("optim.scheduler optim.lr_scheduler optim.lr_schedule optim.schedule", _SCHEDULE),
    ("optim.min_lr optim.gamma optim.step_size", _SCHEDULE),
    ("train.accumulate train.accumulation train.accumulation_steps", _ACCUMULATION),
    ("train.gradient_accumulation train.gradient_accumulation_steps", _ACCUMULATION),
    ("_base_ base defaults", "a recipe stands alone: begin with the other one and add key=value, or copy its file"),
    ("config cfg recipe", "a recipe comes first and has no key: manyviews pretrain simclr key=value"),
)
"""The dotted key of a setting that does not exist here, and what to use instead."""

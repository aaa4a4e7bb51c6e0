"""What other libraries and papers call keys, objectives and recipes of ours; and the plural of what is counted."""

from collections.abc import Mapping

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
        ("nce_k nce_m m num_negatives n_negatives neg", "objective.negatives", "objective.m2"),
        ("alpha", "objective.margin", "mixup"),
        ("s", "objective.scale"),
        ("mining miner sampler", "sampling.name"),
        ("z", "normaliser"),
        ("p", "images_per_class"),
        ("out outdir out_dir output_folder logdir log_dir save_dir exp_dir name run_name", "output"),
        ("ckpt checkpoint checkpoint_path resume_from load", "resume"),
        ("save_every save_interval save_freq checkpoint_every", "save_minutes"),
        ("eval_every eval_interval val_interval eval_freq", "monitor", "checks"),
        ("log_interval print_freq log_freq log_every_n_steps", "log_every"),
        ("random_seed manual_seed", "seed"),
        ("labels_file label_file", "data.labels"),
        ("val val_dir test_dir valid eval_dir", "data.test"),
        ("label_fraction percent train_percent", "fraction"),
        ("layer_wise_decay lr_decay llrd", "layer_decay"),
        ("smoothing", "label_smoothing"),
    )
    for name in names.split()
}
"""A name in use elsewhere, in lower case, and the ends of the keys that mean the same here, the likeliest first."""

_SIMCLR = "NT-Xent (InfoNCE) is objective=in_batch, as in recipe simclr"
_PAIRS = "the pairs' contrastive loss is objective=contrastive, as in recipes siamese and siamese_instances"
_ANGLE = "{} is objective=margin_softmax objective.preset={}, as in recipe {}"
_RANKING = "{} is objective=ranking objective.loss={}"

OBJECTIVES: Mapping[str, str] = {
    name: answer
    for names, answer in (
        ("ntxent nt_xent simclr infonce info_nce", _SIMCLR),
        ("cpc", "CPC's bilinear score is objective=in_batch objective.score=bilinear"),
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
        ("npair npairs", "the N-pair loss is objective=n_pair"),
        ("arcface aam", _ANGLE.format("ArcFace", "arcface", "arcface")),
        ("cosface lmcl am_softmax", _ANGLE.format("CosFace (LMCL)", "cosface", "cosface")),
        ("sphereface a_softmax asoftmax", _ANGLE.format("SphereFace (A-Softmax)", "sphereface", "sphereface")),
        ("normface", "NormFace is objective=margin_softmax objective.preset=norm_face"),
        ("listnet list_net", _RANKING.format("ListNet", "list_net") + ", as in recipe list_net"),
        ("listmle list_mle", _RANKING.format("ListMLE", "list_mle")),
        ("ranknet rank_net", _RANKING.format("RankNet", "rank_net")),
    )
    for name in names.split()
}
"""A method's name, in lower case with underscores, and the objective that it is here."""

RECIPES: Mapping[str, str] = {
    name: recipe
    for names, recipe in (
        ("ntxent nt_xent infonce info_nce contrastive_learning", "simclr"),
        ("in_batch dcl decoupled", "quickstart"),
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
    for name in names.split()
}
"""A method's name, in lower case with underscores, and the recipe that trains by it."""


_PROCESSES = (
    "the launcher starts the processes: accelerate launch --multi_gpu --num_processes N scripts/pretrain.py, or "
    "torchrun --nproc-per-node N"
)
HINTS: Mapping[str, str] = {
    name: answer
    for names, answer in (
        ("gpus devices num_gpus n_gpu nproc num_processes world_size nodes strategy", _PROCESSES),
        ("device cuda cpu", "the device is the best one that there is; CUDA_VISIBLE_DEVICES= hides the GPUs"),
        ("config cfg recipe", "a recipe comes first and has no key: pretrain.py simclr key=value"),
    )
    for name in names.split()
}
"""A key that no setting here has, and what is done instead."""


def many(count: int | float, noun: str, plural: str = "") -> str:
    """A number and what is counted: 1 image, 2,000 images, 0.5 epochs."""
    number = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    return f"{number} {noun if count == 1 else plural or f'{noun}s'}"

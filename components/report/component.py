"""`report` as a component of Kubeflow Pipelines: an exit handler."""

from kfp import dsl
from kfp.dsl import PipelineTaskFinalStatus


@dsl.component(base_image="echodistill/train:0.1.0", install_kfp_package=False)
def report(
    prefix: str,
    spec: str,
    status: PipelineTaskFinalStatus,
    storage: str = "",
    run: str = "",
    backend: str = "rayjob",
    namespace: str = "",
) -> str:
    """Say what became of a pipeline run, whatever stopped it, and end a RayJob that nobody watches.

    Args:
        prefix: as the run was given it.
        spec: run spec (YAML).
        status: how the run ended; Kubeflow fills it in.
        storage: as the run was given it.
        run: names the pipeline run.
        backend: of the training.
        namespace: of the RayJob.

    Returns:
        the report, in Markdown.
    """
    from components.report.step import report_run
    from components.steps import spec_of, step

    with step("report") as say:
        return report_run(
            prefix,
            spec_of(spec),
            say,
            storage=storage,
            run=run,
            state=status.state,
            error=status.error_message or "",
            namespace=namespace if backend == "rayjob" else None,
        )

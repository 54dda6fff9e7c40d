/* The options that pyxis gives to srun, and nothing of its containers: what was given shows in a task's environment. */
#include <slurm/spank.h>
#include <stdlib.h>

SPANK_PLUGIN(pyxis_stand_in, 1)

static const char *names[] = {"SEEN_CONTAINER_IMAGE", "SEEN_CONTAINER_MOUNTS", "SEEN_CONTAINER_WORKDIR",
                              "SEEN_NO_CONTAINER_MOUNT_HOME", "SEEN_CONTAINER_ENV"};

static int seen(int option, const char *value, int remote)
{
    if (!remote)
        setenv(names[option], value ? value : "yes", 1);
    return ESPANK_SUCCESS;
}

static struct spank_option options[] = {
    {"container-image", "IMAGE", "image", 1, 0, seen},
    {"container-mounts", "SRC:DST", "mounts", 1, 1, seen},
    {"container-workdir", "PATH", "working directory", 1, 2, seen},
    {"no-container-mount-home", NULL, "no home", 0, 3, seen},
    {"container-env", "NAMES", "variables of the host that win", 1, 4, seen},
};

int slurm_spank_init(spank_t spank, int argc, char **argv)
{
    (void)argc;
    (void)argv;
    for (size_t number = 0; number < sizeof options / sizeof *options; number++)
        if (spank_option_register(spank, &options[number]) != ESPANK_SUCCESS)
            return -1;
    return 0;
}

/* A stand-in for libnvidia-ml.so.1: answers real pynvml from a text file, so that a test can change
 * memory, add processes, lose a device or raise an XID while the reader runs.
 *
 * The file named by $NVML_STUB_STATE is read again at every call. Its lines:
 *     init CODE                      what nvmlInit returns
 *     I uuid|name TEXT               device I; the number of devices is the highest I plus one
 *     I total|reserved|used|free|util|temp_c|power_mw|ecc NUMBER
 *     I cc MAJOR.MINOR               compute capability
 *     I bus NUMBER                   of its PCI address
 *     I link_LINK gpu|switch BUS     that NVLink is up, and what is at its other end
 *     I process PID BYTES compute|graphics          BYTES -1: not available
 *     I xid SEQUENCE CODE            an event, raised once for each new SEQUENCE above 0
 *     I error FUNCTION CODE          that function fails for device I; FUNCTION * is every one
 * Compiled with -DOLD_DRIVER it lacks the symbols that old drivers lack.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, BAD_ARGUMENT = 2, TOO_SMALL = 7, TIMEOUT = 10, DEVICES = 16, LINE = 512 };

typedef struct { int index; unsigned long long raised; } Device;
typedef struct { Device *device; } EventSet;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } MemoryV2;
typedef struct { unsigned gpu, memory; } Utilization;
typedef struct { unsigned version, sensor; int temperature; } Temperature;
typedef struct { unsigned pid; unsigned long long bytes; unsigned gi, ci; } Process;
typedef struct {
    char legacy_id[16];
    unsigned domain, bus, device, id, subsystem;
    char bus_id[32];
} PciInfo;
typedef struct { Device *device; unsigned long long type, data; unsigned gi, ci; } Event;

static Device devices[DEVICES];

static FILE *state(void) {
    const char *path = getenv("NVML_STUB_STATE");
    return path ? fopen(path, "r") : NULL;
}

/* The text after `I key ` of the first such line; 0 if there is none. */
static int find(int index, const char *key, char *out) {
    char line[LINE], prefix[LINE];
    int found = 0;
    FILE *file = state();
    if (!file) return 0;
    snprintf(prefix, sizeof prefix, "%d %s ", index, key);
    while (!found && fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        if (!strncmp(line, prefix, strlen(prefix))) {
            strcpy(out, line + strlen(prefix));
            found = 1;
        }
    }
    fclose(file);
    return found;
}

static unsigned long long number(int index, const char *key) {
    char text[LINE];
    return find(index, key, text) ? strtoull(text, NULL, 10) : 0;
}

static int fails(int index, const char *function) {
    char key[LINE], text[LINE];
    snprintf(key, sizeof key, "error %s", function);
    if (find(index, key, text) || find(index, "error *", text)) return atoi(text);
    return SUCCESS;
}

#define GUARD(device)                                     \
    do {                                                  \
        int code_ = fails((device)->index, __func__);     \
        if (code_) return code_;                          \
    } while (0)

int nvmlInitWithFlags(unsigned flags) {
    char line[LINE];
    int code = SUCCESS;
    FILE *file = state();
    (void)flags;
    if (!file) return 9; /* driver not loaded */
    while (fgets(line, sizeof line, file)) sscanf(line, "init %d", &code);
    fclose(file);
    for (int i = 0; i < DEVICES; i++) devices[i].index = i;
    return code;
}

int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int code) {
    static char text[32];
    snprintf(text, sizeof text, "stub error %d", code);
    return text;
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    char line[LINE];
    int index;
    FILE *file = state();
    *count = 0;
    if (!file) return 9;
    while (fgets(line, sizeof line, file))
        if (sscanf(line, "%d ", &index) == 1 && index + 1 > (int)*count) *count = index + 1;
    fclose(file);
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **device) {
    if (index >= DEVICES) return BAD_ARGUMENT;
    GUARD(&devices[index]);
    *device = &devices[index];
    return SUCCESS;
}

static int text(Device *device, const char *key, char *out, unsigned length) {
    char found[LINE] = "";
    find(device->index, key, found);
    snprintf(out, length, "%s", found);
    return SUCCESS;
}

int nvmlDeviceGetUUID(Device *device, char *out, unsigned length) {
    GUARD(device);
    return text(device, "uuid", out, length);
}

int nvmlDeviceGetName(Device *device, char *out, unsigned length) {
    GUARD(device);
    return text(device, "name", out, length);
}

int nvmlDeviceGetMemoryInfo(Device *device, Memory *memory) {
    GUARD(device);
    memory->total = number(device->index, "total");
    memory->free = number(device->index, "free");
    memory->used = memory->total - memory->free; /* version 1: the reserve is in used */
    return SUCCESS;
}

#ifndef OLD_DRIVER
int nvmlDeviceGetMemoryInfo_v2(Device *device, MemoryV2 *memory) {
    GUARD(device);
    if (memory->version != (sizeof(MemoryV2) | 2u << 24)) return 25; /* wrong struct version */
    memory->total = number(device->index, "total");
    memory->reserved = number(device->index, "reserved");
    memory->free = number(device->index, "free");
    memory->used = number(device->index, "used");
    return SUCCESS;
}

int nvmlDeviceGetTemperatureV(Device *device, Temperature *temperature) {
    GUARD(device);
    if (temperature->version != (sizeof(Temperature) | 1u << 24)) return 25;
    temperature->temperature = (int)number(device->index, "temp_c");
    return SUCCESS;
}
#endif

int nvmlDeviceGetTemperature(Device *device, unsigned sensor, unsigned *out) {
    (void)sensor;
    GUARD(device);
    *out = (unsigned)number(device->index, "temp_c");
    return SUCCESS;
}

int nvmlDeviceGetUtilizationRates(Device *device, Utilization *out) {
    GUARD(device);
    out->gpu = (unsigned)number(device->index, "util");
    out->memory = 0;
    return SUCCESS;
}

int nvmlDeviceGetPowerUsage(Device *device, unsigned *out) {
    GUARD(device);
    *out = (unsigned)number(device->index, "power_mw");
    return SUCCESS;
}

int nvmlDeviceGetTotalEccErrors(Device *device, unsigned kind, unsigned counter,
                                unsigned long long *out) {
    GUARD(device);
    if (kind != 1 || counter != 0) return BAD_ARGUMENT; /* uncorrected, volatile */
    *out = number(device->index, "ecc");
    return SUCCESS;
}

int nvmlDeviceGetCudaComputeCapability(Device *device, int *major, int *minor) {
    char text[LINE];
    GUARD(device);
    if (!find(device->index, "cc", text)) return 3; /* not supported */
    return sscanf(text, "%d.%d", major, minor) == 2 ? SUCCESS : BAD_ARGUMENT;
}

static void address(PciInfo *info, unsigned bus) {
    memset(info, 0, sizeof *info);
    info->bus = bus;
}

int nvmlDeviceGetPciInfo_v3(Device *device, PciInfo *info) {
    GUARD(device);
    address(info, (unsigned)number(device->index, "bus"));
    return SUCCESS;
}

/* What is at the other end of a link: 0 nothing, 1 a GPU, 2 a switch. */
static int other_end(Device *device, unsigned link, unsigned *bus) {
    char key[LINE], text[LINE], kind[LINE];
    snprintf(key, sizeof key, "link_%u", link);
    if (!find(device->index, key, text) || sscanf(text, "%s %u", kind, bus) != 2) return 0;
    return strcmp(kind, "switch") ? 1 : 2;
}

int nvmlDeviceGetNvLinkState(Device *device, unsigned link, unsigned *active) {
    unsigned bus;
    GUARD(device);
    *active = other_end(device, link, &bus) != 0;
    return SUCCESS;
}

int nvmlDeviceGetNvLinkRemotePciInfo_v2(Device *device, unsigned link, PciInfo *info) {
    unsigned bus = 0;
    GUARD(device);
    if (!other_end(device, link, &bus)) return BAD_ARGUMENT;
    address(info, bus);
    return SUCCESS;
}

#ifndef OLD_DRIVER
int nvmlDeviceGetNvLinkRemoteDeviceType(Device *device, unsigned link, unsigned *type) {
    unsigned bus;
    GUARD(device);
    *type = other_end(device, link, &bus) == 2 ? 2 : 0; /* switch, gpu */
    return SUCCESS;
}
#endif

static int processes(Device *device, const char *kind, unsigned *count, Process *out) {
    char line[LINE], of[LINE];
    unsigned room = out ? *count : 0, found = 0, pid;
    int index;
    long long bytes;
    FILE *file = state();
    if (!file) return 9;
    while (fgets(line, sizeof line, file)) {
        if (sscanf(line, "%d process %u %lld %s", &index, &pid, &bytes, of) != 4) continue;
        if (index != device->index || strcmp(of, kind)) continue;
        if (found < room) out[found] = (Process){pid, (unsigned long long)bytes, 0, 0};
        found++;
    }
    fclose(file);
    *count = found;
    return found > room ? TOO_SMALL : SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(Device *device, unsigned *count, Process *out) {
    GUARD(device);
    return processes(device, "compute", count, out);
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(Device *device, unsigned *count, Process *out) {
    GUARD(device);
    return processes(device, "graphics", count, out);
}

int nvmlEventSetCreate(EventSet **set) {
    *set = calloc(1, sizeof **set);
    return SUCCESS;
}

int nvmlEventSetFree(EventSet *set) {
    free(set);
    return SUCCESS;
}

int nvmlDeviceRegisterEvents(Device *device, unsigned long long types, EventSet *set) {
    GUARD(device);
    if (types != 8) return BAD_ARGUMENT; /* XIDs and nothing else */
    set->device = device;
    return SUCCESS;
}

int nvmlEventSetWait_v2(EventSet *set, Event *event, unsigned timeout_ms) {
    char line[LINE];
    int index;
    unsigned long long sequence, code;
    FILE *file;
    (void)timeout_ms;
    if (!set->device) return TIMEOUT;
    GUARD(set->device);
    file = state();
    if (!file) return 9;
    while (fgets(line, sizeof line, file)) {
        if (sscanf(line, "%d xid %llu %llu", &index, &sequence, &code) != 3) continue;
        if (index != set->device->index || sequence <= set->device->raised) continue;
        set->device->raised = sequence;
        *event = (Event){set->device, 8, code, ~0u, ~0u};
        fclose(file);
        return SUCCESS;
    }
    fclose(file);
    return TIMEOUT;
}

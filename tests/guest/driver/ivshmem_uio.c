// SPDX-License-Identifier: (GPL-2.0 OR MIT)
/* ivshmem-doorbell devices as uio devices: registers, shared memory, and one count of interrupts.
 *
 * The tests load it into a guest in place of the uio drivers that users download for this device.
 * As with those, map 0 is BAR0, map 1 is BAR2, and all MSI-X vectors count as one interrupt.
 * ivshmem-plain devices have no MSI-X and stay without this driver.
 *
 * A device is registered with uio from probe to remove; the PCI core calls these one after the
 * other.  The interrupt handler keeps nothing: the uio core counts and wakes up waiters.
 */
#include <linux/interrupt.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/slab.h>
#include <linux/uio_driver.h>

#define NAME "ivshmem_uio"
#define REGISTER_BAR 0
#define SHARED_BAR 2
#define MOST 16 /* vectors */

struct ringer {
	struct uio_info info;
	int vectors;
};

static irqreturn_t ringer_handle(int irq, void *given)
{
	struct ringer *ringer = given;

	uio_event_notify(&ringer->info);
	return IRQ_HANDLED;
}

static void name_map(struct uio_mem *map, struct pci_dev *device, int bar, const char *name)
{
	map->name = name;
	map->addr = pci_resource_start(device, bar);
	map->size = PAGE_ALIGN(pci_resource_len(device, bar)); /* uio maps whole pages only */
	map->memtype = UIO_MEM_PHYS;
}

static int request_vectors(struct pci_dev *device, struct ringer *ringer)
{
	int taken, error;

	for (taken = 0; taken < ringer->vectors; taken++) {
		error = request_irq(pci_irq_vector(device, taken), ringer_handle, 0, NAME, ringer);
		if (error)
			goto give_back;
	}
	return 0;

give_back:
	while (taken--)
		free_irq(pci_irq_vector(device, taken), ringer);
	return error;
}

static int ringer_probe(struct pci_dev *device, const struct pci_device_id *id)
{
	struct ringer *ringer;
	int error;

	if (!device->msix_cap)
		return -ENODEV;
	ringer = kzalloc(sizeof(*ringer), GFP_KERNEL);
	if (!ringer)
		return -ENOMEM;
	error = pci_enable_device(device);
	if (error)
		goto free;
	error = pci_request_regions(device, NAME);
	if (error)
		goto disable;
	pci_set_master(device);
	error = ringer->vectors = pci_alloc_irq_vectors(device, 1, MOST, PCI_IRQ_MSIX);
	if (error < 0)
		goto release;
	ringer->info.name = NAME;
	ringer->info.version = "1";
	ringer->info.irq = UIO_IRQ_CUSTOM;
	name_map(&ringer->info.mem[0], device, REGISTER_BAR, "registers");
	name_map(&ringer->info.mem[1], device, SHARED_BAR, "shared");
	error = uio_register_device(&device->dev, &ringer->info);
	if (error)
		goto free_vectors;
	error = request_vectors(device, ringer);
	if (error)
		goto unregister;
	pci_set_drvdata(device, ringer);
	return 0;

unregister:
	uio_unregister_device(&ringer->info);
free_vectors:
	pci_free_irq_vectors(device);
release:
	pci_release_regions(device);
disable:
	pci_disable_device(device);
free:
	kfree(ringer);
	return error;
}

static void ringer_remove(struct pci_dev *device)
{
	struct ringer *ringer = pci_get_drvdata(device);
	int vector;

	for (vector = 0; vector < ringer->vectors; vector++)
		free_irq(pci_irq_vector(device, vector), ringer);
	uio_unregister_device(&ringer->info);
	pci_free_irq_vectors(device);
	pci_release_regions(device);
	pci_disable_device(device);
	kfree(ringer);
}

static const struct pci_device_id ringer_ids[] = {
	{ PCI_DEVICE(0x1af4, 0x1110) },
	{ }
};
MODULE_DEVICE_TABLE(pci, ringer_ids);

static struct pci_driver ringer_driver = {
	.name = NAME,
	.id_table = ringer_ids,
	.probe = ringer_probe,
	.remove = ringer_remove,
};
module_pci_driver(ringer_driver);

MODULE_DESCRIPTION("ivshmem-doorbell devices as uio devices");
MODULE_LICENSE("Dual MIT/GPL");

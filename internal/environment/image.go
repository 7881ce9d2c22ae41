package environment

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/artifact"
	"github.com/pyro-mcp/pyro/internal/environment/debian"
	"github.com/pyro-mcp/pyro/internal/environment/oci"
)

// The properties of an artifact that was made from an OCI image.
const (
	imageDigestProperty = "image_digest"
	configProperty      = "image_config" // JSON of api.ImageConfig
	layersProperty      = "image_layers" // digests, blanks between them
)

// A pulledImage is an environment that was or can be pulled from an OCI image.
type pulledImage struct {
	name      string
	reference string             // in full
	digest    string             // of the artifact, "" if it is not installed
	manifest  *artifact.Manifest // nil if it is not installed
}

// installedImages returns the environments that were pulled, by name.
func (s *Store) installedImages() ([]pulledImage, error) {
	refs, err := s.artifacts.Refs()
	if err != nil {
		return nil, err
	}
	var out []pulledImage
	for _, r := range refs {
		if _, ok := curated(r.Name); ok {
			continue
		}
		i, err := s.lookUp(r.Name)
		if errors.Is(err, api.ErrNotFound) || errors.Is(err, api.ErrDamaged) {
			s.log.Warn("leaving out an environment whose files are damaged", "name", r.Name, "error", err)
			continue
		}
		if err != nil {
			return nil, err
		}
		out = append(out, i)
	}
	slices.SortFunc(out, func(a, b pulledImage) int { return cmp.Compare(a.name, b.name) })
	return out, nil
}

// recipe names what an image's environment is made from. The reference stands
// in it, and not in the artifact's properties, because two references may mean
// one image, which is then one artifact.
func recipe(imageDigest, reference string) string {
	return strings.Join([]string{"image", oci.BuildVersion, imageDigest, reference}, " ")
}

// lookUp returns the pulled image with exactly that name.
func (s *Store) lookUp(name string) (pulledImage, error) {
	ref, m, err := s.artifacts.Lookup(name)
	if err != nil {
		return pulledImage{}, err
	}
	words := strings.SplitN(ref.Recipe, " ", 4)
	if len(words) != 4 || words[0] != "image" {
		return pulledImage{}, api.Errorf(api.ErrDamaged, "environment %q: its reference file names no image", name)
	}
	return pulledImage{name: name, reference: words[3], digest: ref.Digest, manifest: &m}, nil
}

// findImage returns what name means: an installed environment by its name, or
// by the reference of its image, or one that the reference would pull.
func (s *Store) findImage(name string) (pulledImage, error) {
	if oci.IsReference(name) {
		return s.findReference(name)
	}
	for _, candidate := range []string{name, tagged(name)} {
		i, err := s.lookUp(candidate)
		if err == nil || errors.Is(err, api.ErrDamaged) {
			return i, err
		}
	}
	return pulledImage{}, unknown(name)
}

// tagged adds the tag that is meant where none is given.
func tagged(name string) string {
	ref, err := oci.ParseReference("docker://" + name)
	if err != nil {
		return name
	}
	return ref.ShortName()
}

func unknown(name string) error {
	var names []string
	for _, r := range debian.Catalog {
		names = append(names, r.Name)
	}
	err := api.Errorf(api.ErrNotFound, "there is no environment %.100q", name)
	if _, perr := oci.ParseReference("docker://" + name); perr == nil {
		return api.WithHint(err, "if it is an image of a registry, run pyro env pull docker://%s; the curated environments are %s", name, strings.Join(names, ", "))
	}
	return api.WithHint(err, "the environments are %s, and what pyro env pull has brought", strings.Join(names, ", "))
}

func (s *Store) findReference(given string) (pulledImage, error) {
	ref, err := oci.ParseReference(given)
	if err != nil {
		return pulledImage{}, err
	}
	i := pulledImage{name: defaultName(ref), reference: ref.String()}
	all, err := s.installedImages()
	if err != nil {
		return pulledImage{}, err
	}
	found := false
	for _, have := range all {
		// Under several names the usual one counts, else the first.
		if have.reference == i.reference && (!found || have.name == defaultName(ref)) {
			i, found = have, true
		}
	}
	return i, nil
}

// defaultName is the image's short name, unless the catalog has one of that
// name.
func defaultName(ref oci.Reference) string {
	name := ref.ShortName()
	if _, ok := curated(name); ok {
		return "docker://" + name
	}
	return name
}

// validName is what docker's references are made of. maxName is the limit of
// package artifact.
var validName = regexp.MustCompile(`^[A-Za-z0-9\[][A-Za-z0-9\[\]._:/@+-]*$`)

const maxName = 80

// useImage holds the installed environment that name means. By an image's
// reference it is pulled first if it is not there; by a name it has to be
// there.
func (s *Store) useImage(ctx context.Context, name string, progress func(api.Progress)) (*artifact.Held, error) {
	i, err := s.findImage(name)
	if err != nil {
		return nil, err
	}
	if i.manifest == nil {
		_, held, err := s.pullImage(ctx, name, "", progress)
		return held, err
	}
	return s.artifacts.Acquire(ctx, i.name)
}

// pullImage installs what the reference given means now, or what an installed
// name was pulled from.
func (s *Store) pullImage(ctx context.Context, given, alias string, progress func(api.Progress)) (_ pulledImage, _ *artifact.Held, err error) {
	if progress == nil {
		progress = func(api.Progress) {}
	}
	i, err := s.findImage(given)
	if err != nil {
		return i, nil, err
	}
	ref, err := oci.ParseReference(i.reference)
	if err != nil {
		return i, nil, err
	}
	if alias != "" {
		i.name = alias
	}
	if err := s.checkName(i); err != nil {
		return i, nil, err
	}
	progress(api.Progress{Phase: "lists", Message: "looking up " + i.reference})
	img, err := s.images.Resolve(ctx, ref)
	if err != nil {
		return i, nil, err
	}
	defer func() { err = errors.Join(err, img.Close()) }()
	config, err := json.Marshal(img.Config)
	if err != nil {
		return i, nil, err
	}
	held, err := s.artifacts.Do(ctx, artifact.Install{
		Name:   i.name,
		Recipe: recipe(img.Digest, i.reference),
		// The layers, and unpacked usually two to three times as much.
		NeedBytes: 4*img.CompressedBytes() + 64<<20,
		Progress:  progress,
		Build: func(ctx context.Context, b *artifact.Build) error {
			f, err := os.OpenFile(filepath.Join(b.Out, debian.ImageFile), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
			if err != nil {
				return err
			}
			defer f.Close()
			mib, err := s.images.Build(ctx, img, f, progress)
			if err != nil {
				return err
			}
			b.Properties[debian.DiskMiBProperty] = strconv.Itoa(mib)
			b.Properties[imageDigestProperty] = img.Digest
			b.Properties[configProperty] = string(config)
			b.Properties[layersProperty] = strings.Join(img.LayerDigests(), " ")
			return f.Close()
		},
	})
	if err != nil {
		return i, nil, fmt.Errorf("pulling the image %s: %w", i.reference, err)
	}
	i.digest, i.manifest = held.Digest, &held.Manifest
	return i, held, nil
}

// checkName reports whether i's name can be given to it.
func (s *Store) checkName(i pulledImage) error {
	if name := strings.TrimPrefix(i.name, "docker://"); len(name) > maxName || !validName.MatchString(name) || strings.Contains(i.name, "..") {
		return api.WithHint(api.Errorf(api.ErrInvalid, "an environment cannot be called %.100q", i.name),
			"give it a name of up to 80 letters, digits and ._:/@+- with --name")
	}
	if _, ok := curated(i.name); ok {
		return api.WithHint(api.Errorf(api.ErrExists, "%q is the name of a curated environment", i.name), "give it another name with --name")
	}
	if oci.IsReference(i.name) {
		// Only what defaultName makes; any other would hide what it refers to.
		if ref, err := oci.ParseReference(i.reference); err != nil || defaultName(ref) != i.name {
			return api.WithHint(api.Errorf(api.ErrInvalid, "a name cannot be a reference, as %.100q is", i.name), "give it another name with --name")
		}
	}
	have, err := s.lookUp(i.name)
	if err == nil && have.reference != i.reference {
		return api.WithHint(api.Errorf(api.ErrExists, "the environment %q was pulled from %s", i.name, have.reference),
			"give this one another name with --name, or run pyro env remove %s", i.name)
	}
	return nil
}

func (s *Store) describeImage(i pulledImage) api.Environment {
	env := api.Environment{
		Name:            i.name,
		Version:         oci.BuildVersion,
		Description:     "OCI image " + i.reference,
		Source:          "oci image",
		DefaultPackages: []string{},
		Platform:        oci.Platform(),
		ImageReference:  i.reference,
	}
	if i.manifest == nil {
		return env
	}
	env.Installed = true
	env.Digest = i.digest
	env.InstallDir = s.artifacts.ObjectDir(i.digest)
	env.SizeBytes = artifact.UsedBytes(env.InstallDir)
	env.ImageDigest = i.manifest.Properties[imageDigestProperty]
	if c, err := configOf(*i.manifest); err == nil {
		env.Config = &c
	}
	return env
}

// configOf returns the settings of the image that an artifact was made from,
// none for a curated environment.
func configOf(m artifact.Manifest) (c api.ImageConfig, err error) {
	text := m.Properties[configProperty]
	if text == "" {
		return c, nil
	}
	if err := json.Unmarshal([]byte(text), &c); err != nil {
		return c, api.Errorf(api.ErrDamaged, "reading the image's settings: %w", err)
	}
	return c, nil
}

// Remove takes the environment's name away, and its files unless inUse names
// their digest, another name means them or somebody holds them: then the next
// Prune after that does. What is not installed is api.ErrNotFound.
func (s *Store) Remove(ctx context.Context, name string, inUse []string) (api.PruneResult, error) {
	out := api.PruneResult{Removed: []string{}}
	if _, ok := curated(name); !ok {
		i, err := s.findImage(name)
		if err != nil && !errors.Is(err, api.ErrDamaged) {
			return out, err
		}
		if err == nil {
			name = i.name
		}
	}
	ref, _, err := s.artifacts.Lookup(name)
	if errors.Is(err, api.ErrNotFound) {
		return out, api.Errorf(api.ErrNotFound, "environment %q is not installed", name)
	}
	if err != nil && !errors.Is(err, api.ErrDamaged) {
		return out, err
	}
	if err := s.artifacts.Forget(name); err != nil {
		return out, fmt.Errorf("removing environment %q: %w", name, err)
	}
	out.Removed = append(out.Removed, name)
	pruned, err := s.Prune(ctx, PruneOptions{InUse: inUse})
	for _, what := range pruned.Removed {
		if what != ref.Digest {
			out.Removed = append(out.Removed, what)
		}
	}
	out.FreedBytes = pruned.FreedBytes
	return out, err
}

// pruneLayers removes the layers that no installed environment was made of:
// the others spare the next version of an image the download of what it
// shares. With all, every layer goes.
func (s *Store) pruneLayers(all bool, out *api.PruneResult) error {
	var keep []string
	if !all {
		installed, err := s.installedImages()
		if err != nil {
			return err
		}
		for _, i := range installed {
			keep = append(keep, strings.Fields(i.manifest.Properties[layersProperty])...)
		}
	}
	freed, err := s.images.PruneLayers(keep)
	if freed > 0 {
		out.Removed = append(out.Removed, "layers of images")
		out.FreedBytes += freed
	}
	return err
}
